"""The public face: every name resolves to its home, and importing it loads nothing heavy."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_aot

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", qwen_aot.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(qwen_aot, name)
    if name != "__version__":
        assert value.__doc__


def test_names_are_what_type_checkers_see() -> None:
    """The imports for type checkers name the modules that the lazy table names."""
    tree = ast.parse(Path(qwen_aot.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            seen |= {alias.name: node.module for alias in node.names}
    assert set(seen) | {"load", "__version__"} == set(qwen_aot.__all__)
    for name, module in seen.items():
        assert getattr(qwen_aot, name) is getattr(importlib.import_module(str(module)), name)


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, qwen_aot\n"
        "heavy = ('torch', 'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers', 'tokenizers', 'rich', 'click')\n"
        "print([name for name in heavy if name in sys.modules], set(qwen_aot.__all__) <= set(dir(qwen_aot)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'qwen_aot' has no attribute 'nothing'"):
        qwen_aot.nothing  # noqa: B018


def test_load_opens_a_bundle() -> None:
    with pytest.raises(qwen_aot.BundleError, match="doesn't exist; accepted: a bundle's folder"):
        qwen_aot.load("no-such-folder")
