"""Weights of extreme size in every form that they are stored in: finite numbers, or an error that names the row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.lowering.ort.provider import Provider
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.lowering.tensorrt.plugin import PluginOptions
from qwen_aot.exporter.lowering.tensorrt.standard import StandardOptions
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.quantize.blockwise import BlockFormat
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from tests.exporter.graph.test_trace import DENSE, MOE

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
DOWN, EXPERT = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.experts.1.down_proj.weight"
BIAS, NORM = "model.layers.0.self_attn.k_proj.bias", "model.norm.weight"
ROW = 5

Lower = Callable[[Traced], Traced]
_FP16, _FP32 = 65504.0, np.inf


def _standard(weights: Any) -> Lower:
    return lambda traced: standard.lower(traced, StandardOptions(weights, quantize_head=weights is not None))


def _plugin(weights: Any) -> Lower:
    return lambda traced: plugin.lower(traced, PluginOptions(weights))


def _ort(bits: int | None, provider: Provider = Provider.CPU, symmetric: bool = True) -> Lower:
    weights = None if bits is None else BlockFormat(bits, 16, symmetric)
    return lambda traced: ort.lower(traced, OrtOptions(weights, provider=provider))


# Form -> (trace, lowering, tensor, the largest weight of a row that it holds).
FORMS: dict[str, tuple[str, ir.DataType, Lower, str, float]] = {
    "standard fp16": ("dense", FLOAT16, _standard(None), DOWN, _FP16),
    "standard int8": ("dense", FLOAT16, _standard("int8"), DOWN, 2031.0),
    "standard fp8": ("dense", FLOAT16, _standard("fp8"), DOWN, 1791.1),
    "standard int4": ("dense", FLOAT16, _standard("int4"), DOWN, _FP16),
    "plugin fp16": ("moe", FLOAT16, _plugin(None), EXPERT, _FP16),
    "plugin int8": ("moe", FLOAT16, _plugin("int8"), EXPERT, _FP16),
    "plugin int8 bias": ("moe", FLOAT16, _plugin("int8"), BIAS, _FP16),
    "cpu fp32": ("dense", FLOAT, _ort(None), DOWN, _FP32),
    "cpu int8": ("dense", FLOAT, _ort(8), DOWN, _FP32),
    "cpu int4 asymmetric": ("dense", FLOAT, _ort(4, symmetric=False), DOWN, _FP32),
    "cuda int8": ("dense", FLOAT16, _ort(8, Provider.CUDA), DOWN, _FP16),
    "cuda int4 asymmetric": ("dense", FLOAT16, _ort(4, Provider.CUDA, symmetric=False), DOWN, _FP16),
    "cuda bias": ("dense", FLOAT16, _ort(8, Provider.CUDA), BIAS, _FP16),
    "standard norm": ("dense", FLOAT16, _standard(None), NORM, _FP32),
}
SIZES = (1e-30, 1e-7, 1e-4, 1790.0, 1793.0, 2030.0, 2033.0, 65000.0, 66000.0, 3e38)


class Extreme(RandomCheckpoint):
    """Random weights, but one row of one tensor has a largest magnitude that is given."""

    def __init__(self, config: ModelConfig, tensor: str, size: float) -> None:
        super().__init__(config)
        self._tensor, self._size = tensor, size

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        values = super().read(name).astype(np.float32)
        if name == self._tensor:
            values[ROW] = values[ROW] / np.abs(values[ROW]).max() * np.float32(self._size)
        return values if rows is None else values[rows]


@functools.cache
def _traced(kind: str, dtype: ir.DataType) -> Traced:
    base = DENSE if kind == "dense" else MOE
    moe = None if base.moe is None else dataclasses.replace(base.moe, sparse_layers=frozenset({0}))
    return trace(dataclasses.replace(base, hidden_size=64, intermediate_size=64, num_hidden_layers=1, moe=moe), dtype)


def _fresh(kind: str, dtype: ir.DataType) -> Traced:
    made = _traced(kind, dtype)
    return Traced(made.model.clone(), made.config, dict(made.recipes))


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_any_size_is_finite_or_named(form: str, tmp_path: Path) -> None:
    kind, dtype, lower, tensor, largest = FORMS[form]
    lowered = lower(_fresh(kind, dtype))
    for size in SIZES:
        checkpoint = Extreme(lowered.config, tensor, size)
        if size > largest:
            with pytest.raises(ExportError, match=rf"tensor {tensor}, row {ROW}: .*magnitude .*(use|choose) a "):
                stitch(lowered, checkpoint, tmp_path / "data", threads=1)
            continue
        stitch(lowered, checkpoint, tmp_path / "data", threads=1)
        for name, value in lowered.model.graph.initializers.items():
            assert value.const_value is not None and value.dtype is not None
            if value.dtype.is_floating_point():
                assert np.isfinite(value.const_value.numpy().astype(np.float32)).all(), (form, size, name)


def test_the_forms_hold_what_the_table_says() -> None:
    """At least one size lies on each side of each limit, so that the test above sees both."""
    for *_, largest in FORMS.values():
        assert any(size <= largest for size in SIZES) and (largest == np.inf or any(size > largest for size in SIZES))


def test_codes_for_cuda_are_of_the_scales_that_are_stored(tmp_path: Path) -> None:
    """Blocks whose scales fp16 holds with few digits: codes of the exact scale would be off by several of its steps."""
    kind, dtype, lower, tensor, _ = FORMS["cuda int8"]
    lowered = lower(_fresh(kind, dtype))
    checkpoint = Extreme(lowered.config, tensor, 1e-5)
    stitch(lowered, checkpoint, tmp_path / "data", threads=1)
    made = {}
    for part in ("codes", "scales"):
        stored = lowered.model.graph.initializers[f"{DOWN}_{part}"].const_value
        assert stored is not None
        made[part] = stored.numpy()[ROW].astype(np.float32)
    values = (made["codes"] - 128) * made["scales"][:, None]
    row = checkpoint.read(tensor)[ROW].astype(np.float16).astype(np.float32)
    assert np.abs(values.reshape(-1)[: len(row)] - row).max() <= np.abs(made["scales"]).max() * 1.001
