"""compressed-tensors' int8 weights, with and without rounded inputs, against codes written number by number."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, Encoding
from qwen_aot.exporter.checkpoint.hf.quantized.compressed_tensors_config import parse
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.exporter.checkpoint.hf.quantized.test_gptq import check
from tests.quantized_files import Codes, Parts, Saved, compressed_tensors_config, random_codes, save_quantized

UP = "model.layers.0.mlp.up_proj"
INPUTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "tensor",
    "dynamic": False,
    "group_size": None,
    "block_structure": None,
    "observer": "minmax",
    "observer_kwargs": {},
    "actorder": None,
}


def config(inputs: dict[str, Any] | None = INPUTS, **weights: Any) -> dict[str, Any]:
    found = compressed_tensors_config(
        {"num_bits": 8, "strategy": "channel", "group_size": None, "symmetric": True} | weights
    )
    found["format"] = "int-quantized"
    found["config_groups"]["group_0"] |= {"format": "int-quantized", "input_activations": inputs}
    return found


def pack(weight: Codes, *, rounds_inputs: bool = True, symmetric: bool = True) -> Parts:
    parts = {
        "weight": np.array([[int(code) - 128 for code in row] for row in weight.codes], np.int8),
        "weight_scale": weight.scales,
    }
    if rounds_inputs:
        parts["input_scale"] = np.array([weight.codes.shape[1] / 1024], weight.scales.dtype)
    if not symmetric:
        parts["weight_zero_point"] = (weight.zeros.astype(np.int16) - 128).astype(np.int8)
    return parts


def save(
    folder: Path,
    *,
    group_size: int = -1,
    symmetric: bool = True,
    rounds_inputs: bool = True,
    scale_dtype: Any = np.float16,
    **facts: Any,
) -> Saved:
    make = functools.partial(
        random_codes, bits=8, group_size=group_size, symmetric=symmetric, smallest_zero=0, scale_dtype=scale_dtype
    )
    weights = {
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    said = config(INPUTS if rounds_inputs else None, **weights)
    return save_quantized(
        folder, said, functools.partial(pack, rounds_inputs=rounds_inputs, symmetric=symmetric), make=make, **facts
    )


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rounds_inputs", [True, False])
def test_codes_and_scales_are_the_files(group_size: int, symmetric: bool, rounds_inputs: bool, tmp_path: Path) -> None:
    check(save(tmp_path, group_size=group_size, symmetric=symmetric, rounds_inputs=rounds_inputs))
    with open_checkpoint(tmp_path) as checkpoint:
        form = CodeForm(
            8,
            64 if group_size == -1 else group_size,
            np.dtype(np.float16),
            not symmetric,
            has_input_scale=rounds_inputs,
        )
        name = f"compressed-tensors-w8a{8 if rounds_inputs else 16}"
        assert checkpoint.tensors[f"{UP}.weight"].encoding == Encoding(name, form, fixes_precision=True)
        rows = checkpoint.read_encoded(f"{UP}.weight", slice(3, 5))
        assert rows.input_scale == (64 / 1024 if rounds_inputs else None)


def test_bf16_scales_and_a_scale_without_axes(tmp_path: Path) -> None:
    saved = save(tmp_path, scale_dtype=ml_dtypes.bfloat16)
    saved.change(**{f"{UP}.input_scale": np.array(0.25, np.float32)})
    check(saved)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read_encoded(f"{UP}.weight", slice(0, 1)).input_scale == 0.25


def test_a_linear_that_stays_plain(tmp_path: Path) -> None:
    saved = save(tmp_path, names=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj"))
    saved.configure(config() | {"ignore": ["lm_head", "model.layers.0.mlp.down_proj"]})
    check(saved)


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "int32": ("weight", np.zeros((96, 64), np.int32), "has a plain weight and input_scale, weight_scale"),
    "plain": ("weight", np.zeros((96, 64), np.float16), "has a plain weight and input_scale, weight_scale"),
    "cut": ("weight", np.zeros((95, 64), np.int8), r"weight has shape \[95, 64\].*accepted .*: \[96, 64\], int8"),
    "missing": ("weight", None, "weight is missing; the module has input_scale, weight_scale"),
    "scale missing": ("weight_scale", None, "weight_scale is missing"),
    "scale cut": ("weight_scale", np.ones((95, 1), np.float16), r"weight_scale has shape \[95, 1\]"),
    "scale flat": ("weight_scale", np.ones(96, np.float16), r"weight_scale has shape \[96\].*accepted by the conf"),
    "scale of groups": ("weight_scale", np.ones((96, 2), np.float16), "8 bits in one group a row, symmetric, with inp"),
    "zero points": ("weight_zero_point", np.zeros((96, 1), np.int8), "with weight_zero_point and input_scale beside"),
    "packed": ("weight_packed", np.zeros((96, 16), np.int32), "weight_packed is of pack-quantized, and the config"),
    "no input scale": ("input_scale", None, "with no weight_zero_point and no input_scale beside it; accepted"),
    "input scale 0": ("input_scale", np.zeros(1, np.float16), r"input_scale is 0\.0; accepted: a finite number above"),
    "input scale nan": ("input_scale", np.array([np.nan], np.float16), "input_scale is nan; accepted"),
    "input scale infinite": ("input_scale", np.array([np.inf], np.float16), "input_scale is inf; accepted"),
    "input scale negative": ("input_scale", -np.ones(1, np.float16), r"input_scale is -1\.0; accepted"),
    "input scales": ("input_scale", np.ones(2, np.float16), r"input_scale has shape \[2\].*: \[1\]"),
    "input scale int": ("input_scale", np.ones(1, np.int32), "input_scale has .*dtype int32"),
    "input zero point": ("input_zero_point", np.zeros(1, np.int8), "input_zero_point has dtype int8; accepted: float"),
}


@pytest.mark.parametrize(("suffix", "array", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage(suffix: str, array: Any, message: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.change(**{f"{UP}.{suffix}": array})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_int8_weights_of_another_method(method: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    facts: dict[str, Any] = {"sym": True} if method == "gptq" else {"version": "gemm", "zero_point": True}
    saved.configure({"quant_method": method, "bits": 4, "group_size": 32, **facts})
    with pytest.raises(CheckpointError, match="no tensor is; accepted"):
        open_checkpoint(tmp_path)


REFUSED_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": ({"dynamic": True}, "dynamic is true: each step would find its own scales; not supported; accepted"),
    "local": ({"dynamic": "local"}, 'dynamic is "local": each step would find'),
    "token": ({"strategy": "token"}, 'strategy is "token"; not supported; accepted: "tensor"'),
    "no strategy": ({"strategy": None}, "num_bits or strategy is missing"),
    "asymmetric": ({"symmetric": False}, "symmetric is false; not supported; accepted: true"),
    "4 bits": ({"num_bits": 4}, "num_bits is 4; not supported; accepted: 8"),
    "no bits": ({"num_bits": None}, "num_bits or strategy is missing"),
    "fp8": ({"type": "float"}, 'type is "float"; not supported; accepted: "int"'),
    "groups": ({"group_size": 128}, "group_size is 128; not known here"),
    "unknown": ({"zeta": 3}, "zeta is 3; not known here"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED_INPUTS.values(), ids=REFUSED_INPUTS)
def test_refused_inputs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f'config_groups, "group_0": input_activations: {message}'):
        parse(config(INPUTS | change))


def test_inputs_that_are_no_object() -> None:
    found = config()
    found["config_groups"]["group_0"]["input_activations"] = 8
    with pytest.raises(CheckpointError, match="input_activations is 8; accepted: an object"):
        parse(found)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 4}, "num_bits is 4; not supported; accepted: 8"),
        ({"actorder": "group"}, 'actorder is "group"; int-quantized has no weight_g_idx; accepted: weight, null'),
    ],
)
def test_refused_weights(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(config(**weights))


def test_a_group_of_the_other_format() -> None:
    found = config()
    found["config_groups"]["group_0"]["format"] = "pack-quantized"
    with pytest.raises(CheckpointError, match='format is "pack-quantized"; not supported; accepted: "int-quantized"'):
        parse(found)
