"""Puts the doubles where the runtime imports its libraries from."""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tests.doubles.cuda_runtime import make_cuda_runtime
from tests.doubles.gpu import Gpu
from tests.doubles.tensorrt import make_tensorrt

VERSIONS = {"tensorrt_rtx": "1.7.1.116", "tensorrt": "10.13.3.9"}


@contextmanager
def installed(gpu: Gpu, versions: dict[str, str] | None = None, *, cache_home: Path | None = None) -> Iterator[Gpu]:
    """Imports of CUDA's bindings and of both TensorRT flavours give the doubles; at the end nothing may be left.

    Args:
        gpu: the double.
        versions: of the flavours.
        cache_home: the user's cache folder; None: one of its own.
    """
    runtime = make_cuda_runtime(gpu)
    bindings, cuda = ModuleType("cuda.bindings"), ModuleType("cuda")
    bindings.runtime = runtime  # type: ignore[attr-defined]
    cuda.bindings = bindings  # type: ignore[attr-defined]
    modules = {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}
    modules |= {flavour: make_tensorrt(gpu, flavour, version) for flavour, version in (versions or VERSIONS).items()}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("XDG_CACHE_HOME", str(cache_home or folder))
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield gpu
    gc.collect()
    gpu.assert_empty()
