"""A graph's inputs and outputs as a manifest lists them."""

from __future__ import annotations

import onnx_ir as ir

from qwen_aot.runtime.bundle.manifest import IoTensor


def io_tensor(value: ir.Value) -> IoTensor:
    """Name, dtype and dimensions of a graph's input or output, which has all of them."""
    assert value.name is not None and value.dtype is not None and value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return IoTensor(name=value.name, dtype=str(value.dtype.numpy()), shape=shape)
