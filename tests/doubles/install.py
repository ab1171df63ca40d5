"""Puts the doubles where the runtime imports its libraries from."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from tests.doubles.cuda_runtime import make_cuda_runtime
from tests.doubles.gpu import Gpu
from tests.doubles.tensorrt import make_tensorrt

VERSIONS = {"tensorrt_rtx": "1.7.1.116", "tensorrt": "10.13.3.9"}


@contextmanager
def installed(gpu: Gpu, versions: dict[str, str] | None = None) -> Iterator[Gpu]:
    """Imports of CUDA's bindings and of both TensorRT flavours give the doubles; at the end nothing may be left."""
    runtime = make_cuda_runtime(gpu)
    bindings, cuda = ModuleType("cuda.bindings"), ModuleType("cuda")
    bindings.runtime = runtime  # type: ignore[attr-defined]
    cuda.bindings = bindings  # type: ignore[attr-defined]
    modules = {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}
    modules |= {flavour: make_tensorrt(gpu, flavour, version) for flavour, version in (versions or VERSIONS).items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield gpu
    gc.collect()
    gpu.assert_empty()
