"""What is said about a package that isn't installed, and that the table names extras which bring it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from qwen_aot.extras import EXTRA_OF, missing_package

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", ["torch", "torch.nn.functional"])
def test_the_extra_is_named(module: str) -> None:
    message = missing_package("qwen_aot.build_bundle", ModuleNotFoundError("no", name=module))
    assert message == (
        "qwen_aot.build_bundle needs the package 'torch', which isn't installed; install it with "
        "`pip install 'qwen-aot[build]'`"
    )


@pytest.mark.parametrize("module", ["qwen_aot.engines.nothing", "torchvision", None])
def test_what_no_extra_brings_is_our_bug(module: str | None) -> None:
    error = ModuleNotFoundError("no", name=module)
    with pytest.raises(ModuleNotFoundError) as raised:
        missing_package("it", error)
    assert raised.value is error


DISTRIBUTIONS = {"cuda": "cuda-bindings", "tensorrt_rtx": "tensorrt-rtx-cu13"}  # where the import has another name


@pytest.mark.parametrize("package", EXTRA_OF)
def test_the_named_extra_brings_the_package(package: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {re.split(r"[^\w-]", requirement)[0] for requirement in extras[EXTRA_OF[package]]}
    assert DISTRIBUTIONS.get(package, package.replace("_", "-")) in brought
