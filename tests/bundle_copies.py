"""Copies of a built bundle in which a tensor of the data file is changed: one build serves many damages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qwen_aot.exporter.graph.save import MODEL_FILE, data_file_of


def data_tensors(bundle: Path, graph: str = MODEL_FILE) -> dict[str, ir.ExternalTensor]:
    """The weights that a bundle's graph points at, by name."""
    initializers = ir.load(bundle / graph).graph.initializers
    return {
        name: value.const_value
        for name, value in initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def changed(
    bundle: Path, copy: Path, tensor: str, edit: Callable[[np.ndarray[Any, Any]], None], graph: str = MODEL_FILE
) -> Path:
    """A copy whose tensor `edit` changed in place: plain types in the tensor's shape, packed ones as bytes."""
    copy.mkdir()
    for path in bundle.iterdir():
        if path.name == data_file_of(graph):
            shutil.copyfile(path, copy / path.name)
        else:
            os.link(path, copy / path.name)
    os.unlink(copy / graph)  # some tests write another
    shutil.copyfile(bundle / graph, copy / graph)
    place = data_tensors(bundle, graph)[tensor]
    assert place.offset is not None and place.length is not None
    dtype, shape = place.dtype.numpy(), place.shape.numpy()
    if place.dtype.bitwidth < 8:
        dtype, shape = np.dtype(np.uint8), (place.length,)
    values = np.memmap(copy / data_file_of(graph), dtype, "r+", offset=place.offset, shape=shape)
    edit(values)
    values.flush()
    return copy
