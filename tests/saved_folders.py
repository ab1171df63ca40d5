"""Codes drawn at random for a checkpoint's matrices, and the folder that a quantizing job writes of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, EncodedRows
from qwen_aot.exporter.checkpoint.hf.saving.folder import QuantizedFolder
from qwen_aot.exporter.model.tensors import Role, Tensor, WeightClass, checkpoint_tensors
from tests import e4m3

HALF = np.dtype(np.float16)
MATRICES = (WeightClass.PROJECTION, WeightClass.DOWN, WeightClass.EXPERT)
REQUEST: Mapping[str, Any] = {"algorithm": "rtn", "seed": 0}


def form(bits: int = 4, group_size: int = 32, *, zero_points: bool = False) -> CodeForm:
    return CodeForm(bits, group_size, HALF, zero_points)


def drawn(form: CodeForm, shape: tuple[int, int], seed: int = 0) -> EncodedRows:
    """Codes and zero points over their whole range."""
    rng = np.random.default_rng(seed)
    n, k = shape
    groups, top = k // form.group_size, 2**form.bits
    scales = (rng.uniform(0.5, 1.5, (n, groups)) / top / k**0.5).astype(np.float16)
    zeros = rng.integers(0, top, (n, groups)).astype(np.uint8) if form.has_zero_points else None
    input_scale = float(np.float16(rng.uniform(0.01, 0.1))) if form.has_input_scale else None
    is_float = form.code_type is CodeType.E4M3
    codes = (rng.choice(e4m3.CODES, (n, k)) if is_float else rng.integers(0, top, (n, k))).astype(np.uint8)
    return EncodedRows(form, codes, scales, zeros, input_scale=input_scale)


def same(one: EncodedRows, other: EncodedRows) -> bool:
    return (
        one.form == other.form
        and one.permutation is None
        and other.permutation is None
        and np.array_equal(one.codes, other.codes)
        and one.scales.tobytes() == other.scales.tobytes()
        and one.input_scale == other.input_scale
        and (one.zero_points is None) == (other.zero_points is None)
        and (one.zero_points is None or np.array_equal(one.zero_points, other.zero_points))
    )


def forms_of(
    checkpoint: Checkpoint,
    choose: Callable[[Tensor], CodeForm] = lambda _: form(),
    classes: Collection[WeightClass] = MATRICES,
) -> dict[str, CodeForm]:
    tensors = checkpoint_tensors(checkpoint.config)
    return {tensor.name: choose(tensor) for tensor in tensors if tensor.role.weight_class in classes}


def codes_of(checkpoint: Checkpoint, forms: Mapping[str, CodeForm]) -> dict[str, EncodedRows]:
    found = {}
    for name, each in forms.items():
        n, k = checkpoint.tensors[name].shape
        found[name] = drawn(each, (n, k), zlib.crc32(name.encode()))
    return found


def of_layer(codes: Mapping[str, EncodedRows], layer: int | None) -> dict[str, EncodedRows]:
    prefix = "model.layers."
    return {
        name: rows
        for name, rows in codes.items()
        if (name.startswith(f"{prefix}{layer}.") if layer is not None else not name.startswith(prefix))
    }


def write(
    out: Path,
    checkpoint: Checkpoint,
    format_name: str,
    forms: Mapping[str, CodeForm],
    request: Mapping[str, Any] = REQUEST,
    plain: Mapping[str, np.ndarray[Any, Any]] | None = None,
    dtype: str | None = None,
    **options: Any,
) -> dict[str, EncodedRows]:
    """A whole job; gives the codes that it wrote."""
    codes = codes_of(checkpoint, forms)
    changed = plain or {}
    with QuantizedFolder(out, checkpoint, format_name, request=request, **options) as folder:
        folder.begin(forms, dtype=dtype)
        for layer in range(folder.layers_done, folder.num_layers):
            own = {name: array for name, array in changed.items() if name.startswith(f"model.layers.{layer}.")}
            folder.add_layer(layer, of_layer(codes, layer), own)
        outside = {name: array for name, array in changed.items() if not name.startswith("model.layers.")}
        folder.finish(of_layer(codes, None), outside)
    return codes


EMBEDDING, HEAD = Role.EMBEDDING.tensor_name(), Role.HEAD.tensor_name()
