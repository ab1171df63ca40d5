"""The public face: every name resolves to its home, and importing it loads nothing heavy."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import qwen_aot
from qwen_aot.extras import install_command

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", qwen_aot.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(qwen_aot, name)
    if name not in ("__version__", "Event", "EventStream", "Message", "Prompt"):  # a text, and names of types
        assert value.__doc__


def test_names_are_what_type_checkers_see() -> None:
    """The imports for type checkers name the modules that the lazy table names, and no name is in one of them alone."""
    tree = ast.parse(Path(qwen_aot.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen, assigned = {}, {}
    for node in block.body:
        match node:
            case ast.ImportFrom():
                seen |= {alias.name: node.module for alias in node.names}
            case ast.Assign():
                assigned[ast.unparse(node.targets[0])] = ast.unparse(node.value)
    assert set(seen) | set(assigned) | {"__version__"} == set(qwen_aot.__all__)
    assert set(qwen_aot._HOMES) | {"__version__"} == set(qwen_aot.__all__)
    for name, module in seen.items():
        assert qwen_aot._HOMES[name] == module
        assert getattr(qwen_aot, name) is getattr(importlib.import_module(str(module)), name)
    assert assigned == qwen_aot._OTHER_NAMES
    assert qwen_aot.load == qwen_aot.Generator.open


def test_a_star_import_gives_every_name() -> None:
    names: dict[str, object] = {}
    exec("from qwen_aot import *", names)
    assert set(qwen_aot.__all__) <= set(names)


def test_a_name_whose_extra_is_missing_is_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_torch(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(importlib, "import_module", no_torch)
    stand_in = qwen_aot.build_bundle
    assert isinstance(stand_in, type) and stand_in.__name__ == "build_bundle"
    message = "qwen_aot.build_bundle needs the package 'torch', which isn't installed; install it with "
    assert stand_in.__doc__ == f"Not here: {message}`{install_command('build')}`."
    with pytest.raises(qwen_aot.errors.BuildError, match=re.escape(f"{message}`{install_command('build')}`")):
        qwen_aot.build_bundle("checkpoint", qwen_aot.errors, out="bundle")
    assert qwen_aot.build_bundle is stand_in  # `isinstance` and comparisons hold
    assert qwen_aot.BuildReport is not stand_in


def test_a_module_of_ours_that_is_missing_is_no_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwen_aot.engines.build", None)
    with pytest.raises(ModuleNotFoundError, match=r"qwen_aot\.engines\.build"):
        qwen_aot.build_bundle  # noqa: B018


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


def test_load_hands_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads and leave for code reach the engine, and what is hashed the reader of the bundle."""
    from qwen_aot.runtime.generation import generator
    from tests.runtime.fakes import FakeEngine
    from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest, write_bundle

    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    folder = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    seen: dict[str, object] = {}

    def open_engine(bundle: object, **options: object) -> FakeEngine:
        seen.update(options)
        return FakeEngine(manifest)

    load_bundle = generator.load_bundle

    def load(path: object, **options: object) -> object:
        seen.update(options)
        return load_bundle(path)  # type: ignore[arg-type]

    monkeypatch.setattr(generator, "open_engine", open_engine)
    monkeypatch.setattr(generator, "load_bundle", load)
    with qwen_aot.load(folder, threads=3, kernels="own", skip_hash_above=7, allow_bundle_code=True) as opened:
        assert list(opened.generate([1, 2], max_new_tokens=1).token_ids) == [5]
    assert seen == {"threads": 3, "kernels": "own", "skip_hash_above": 7, "allow_bundle_code": True}


def test_load_opens_a_bundle() -> None:
    with pytest.raises(qwen_aot.BundleError, match="doesn't exist; accepted: a bundle's folder"):
        qwen_aot.load("no-such-folder")
