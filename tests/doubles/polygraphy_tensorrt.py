"""What Polygraphy's runner uses of TensorRT, for a process without a GPU: an engine is an ONNX file with profiles.

`install` makes it importable as `tensorrt` and `tensorrt_rtx` in processes to come, before any real ones, beside a CUDA
runtime library whose device memory is the host's. Both are as strict as the double of tests/doubles/tensorrt.py about
shapes, and present must be bound where past is.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from tests.doubles.install import VERSIONS
from tests.doubles.tensorrt import METADATA_KEY
from tests.tools import require_tool

CUDA_RUNTIME = """
#include <stdlib.h>
#include <string.h>
typedef void *P;
int cudaStreamCreate(P *s) { *s = malloc(1); return 0; }
int cudaStreamSynchronize(P s) { return 0; }
int cudaStreamDestroy(P s) { free(s); return 0; }
int cudaMalloc(P *p, size_t n) { *p = aligned_alloc(256, (n + 511) / 256 * 256); memset(*p, 0xFF, n); return 0; }
int cudaFree(P p) { free(p); return 0; }
int cudaMemcpy(P to, P from, size_t n, int kind) { memcpy(to, from, n); return 0; }
int cudaMemcpyAsync(P to, P from, size_t n, int kind, P s) { memcpy(to, from, n); return 0; }
"""


def install(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Child processes find the doubles; needs a C compiler."""
    for flavour, version in VERSIONS.items():
        (folder / flavour).mkdir(parents=True)
        (folder / flavour / "__init__.py").write_text(
            f"from tests.doubles.polygraphy_tensorrt import *\n__version__ = {version!r}\n"
        )
    compiler = require_tool("cc", "gcc", remedy="install a C compiler (Debian: apt install gcc)")
    (folder / "cudart.c").write_text(CUDA_RUNTIME)
    library = folder / "libcudart.so.13"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "cudart.c")], check=True)
    patch.setenv("LD_LIBRARY_PATH", os.pathsep.join((str(folder), os.environ.get("LD_LIBRARY_PATH", ""))))
    patch.setenv("PYTHONPATH", os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))))


DataType = Enum("DataType", ["FLOAT", "HALF", "INT32", "INT8", "INT64"])
float32, float16, int32, int8, int64 = DataType
TensorIOMode = Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorFormat = Enum("TensorFormat", ["LINEAR", "HWC", "CHW16"])
_TYPES: dict[str, tuple[DataType, Any]] = {
    "tensor(float)": (float32, np.float32),
    "tensor(float16)": (float16, np.float16),
    "tensor(int64)": (int64, np.int64),
}


class ILogger:
    pass


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IStreamReader:
    pass


class IOutputAllocator:
    pass


class IDebugListener:
    pass


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return True


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, source: Any) -> ICudaEngine:
        return ICudaEngine(source if isinstance(source, bytes) else source.read(1 << 28))


class ICudaEngine:
    def __init__(self, content: bytes) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.profiles = json.loads(self.session.get_modelmeta().custom_metadata_map[METADATA_KEY])["profiles"]
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def value(self, name: str) -> Any:
        return self.inputs.get(name) or self.outputs[name]

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self.value(name).type][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.value(name).shape)

    def get_tensor_format(self, name: str, profile: int) -> TensorFormat:
        return TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present.", "past_key_values.") if name.startswith("present.") else None

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.active_optimization_profile = profile
        return 0 <= profile < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.profiles[self.active_optimization_profile][name]
        self._shapes[name] = tuple(shape)
        return len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self._allocators[name] = allocator
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.engine.inputs:
            return self._shapes.get(name, self.engine.get_tensor_shape(name))
        letters = {
            dim: size
            for known, shape in self._shapes.items()
            for dim, size in zip(self.engine.inputs[known].shape, shape, strict=True)
        }
        return tuple(dim if isinstance(dim, int) else letters.get(dim, -1) for dim in self.engine.value(name).shape)

    def execute_async_v3(self, stream: int) -> bool:
        binding = self.engine.session.io_binding()
        for name in self.engine.inputs:
            self._bind(binding.bind_input, name, self._shapes[name])
        for name in self.engine.outputs:
            past = self.engine.get_aliased_input_tensor(name)
            shape = self.get_tensor_shape(name)
            if past is not None:
                assert self._addresses[name] == self._addresses[past]
            else:
                allocator, size = self._allocators[name], math.prod(shape) * np.dtype(self._type(name)).itemsize
                self._addresses[name] = allocator.reallocate_output_async(name, 0, size, 256, stream)
                allocator.notify_shape(name, shape)
            self._bind(binding.bind_output, name, shape)
        self.engine.session.run_with_iobinding(binding)
        return True

    def _bind(self, bind: Any, name: str, shape: tuple[int, ...]) -> None:
        bind(name, "cpu", 0, self._type(name), list(shape), self._addresses[name])

    def _type(self, name: str) -> Any:
        return _TYPES[self.engine.value(name).type][1]
