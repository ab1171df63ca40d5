"""The C library, compiled once a session."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from tests.checkpoints import save_tiny
from tests.cpu_kernels import own_kernels
from tests.runtime.capi.client import Library
from tests.runtime.capi.native import Native
from tests.shared import once


@pytest.fixture(scope="session")
def native_folder(pytestconfig: pytest.Config) -> Path:
    """Where the flavours of the library are built."""
    return Path(pytestconfig.cache.mkdir("capi"))


@pytest.fixture(scope="session")
def native(native_folder: Path) -> Native:
    """The library's inside, without sanitizers."""
    return Native(native_folder)


@pytest.fixture(scope="session")
def library(native: Native) -> Library:
    """The shared library, loaded."""
    return Library(native.shared())


@pytest.fixture(scope="session")
def onnxruntime() -> Path:
    """The library that this Python's onnxruntime brings."""
    found = importlib.util.find_spec("onnxruntime")
    assert found is not None and found.origin is not None
    (path,) = (Path(found.origin).parent / "capi").glob("libonnxruntime.so.*")
    return path


@pytest.fixture(scope="session")
def cpu_kernels(shared_folder: Path) -> Path:
    """A copy of the library of own kernels: one serves one ONNX Runtime, and that of Python is in this process too."""

    def make(folder: Path) -> Path:
        return Path(shutil.copy(own_kernels(), folder))

    return once(shared_folder / "capi_cpu_kernels", make)


@pytest.fixture(scope="session")
def text_bundle(shared_folder: Path) -> Path:
    """A tiny model with a tokenizer and a chat template, four rows, fp32.

    No library of own kernels lies beside the library that `library` loads: ONNX Runtime's kernels run it, and what is
    compared with Python is asked for with `kernels="onnxruntime"` there.
    """

    def make(folder: Path) -> Path:
        save_tiny(folder / "tiny", with_tokenizer=True)
        build_bundle(
            folder / "tiny", BuildSpec(precision=Precision.FP32, max_context=512, max_batch=4), folder / "bundle"
        )
        return folder / "bundle"

    return once(shared_folder / "capi_bundle", make)
