"""compressed-tensors' float8 weights with rounded inputs, against numbers worked out from the fields of E4M3."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, Encoding
from qwen_aot.exporter.checkpoint.hf.quantized.compressed_tensors_config import parse
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.e4m3 import CODES, NAN, number
from tests.exporter.checkpoint.hf.quantized.test_gptq import check
from tests.quantized_files import Codes, Parts, Saved, compressed_tensors_config, save_quantized

UP = "model.layers.0.mlp.up_proj"
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
INPUTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor",
    "dynamic": False,
    "group_size": None,
    "block_structure": None,
    "observer": "minmax",
    "observer_kwargs": {},
    "actorder": None,
}
INPUT_SCALE = 1 / 128  # inputs of these models behind a norm are up to 3.5


@dataclass(frozen=True)
class FloatCodes(Codes):
    """Codes that are the bits of E4M3."""

    @property
    def values(self) -> NDArray[np.float32]:
        numbers = np.array([number(code) if code in CODES else np.nan for code in range(256)])[self.codes]
        return (numbers * self.scales.astype(np.float64)).astype(np.float32)


def random_floats(n: int, k: int, *, one_scale: bool = False, scale_dtype: Any = np.float16, seed: int = 0) -> Codes:
    """Codes over their whole range but NaN, whose root mean square is 110."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(CODES, (n, k))
    scales = (rng.uniform(0.5, 1.5, (1 if one_scale else n, 1)) / 110 / k**0.5).astype(scale_dtype)
    return FloatCodes(8, codes, np.zeros((n, 1), np.int64), np.repeat(scales, n // len(scales), 0), np.zeros(k, int))


def config(inputs: dict[str, Any] | None = INPUTS, **weights: Any) -> dict[str, Any]:
    found = compressed_tensors_config(
        {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None, "symmetric": True} | weights
    )
    found["format"] = "float-quantized"
    found["config_groups"]["group_0"] |= {"format": "float-quantized", "input_activations": inputs}
    return found


def pack(weight: Codes, *, one_scale: bool = False) -> Parts:
    return {
        "weight": weight.codes.astype(np.uint8).view(E4M3),
        "weight_scale": weight.scales[0] if one_scale else weight.scales,
        "input_scale": np.array([INPUT_SCALE], weight.scales.dtype),
    }


def save(folder: Path, *, one_scale: bool = False, scale_dtype: Any = np.float16, **facts: Any) -> Saved:
    make = functools.partial(random_floats, one_scale=one_scale, scale_dtype=scale_dtype)
    said = config(strategy="tensor" if one_scale else "channel")
    return save_quantized(folder, said, functools.partial(pack, one_scale=one_scale), make=make, **facts)


@pytest.mark.parametrize("one_scale", [True, False], ids=["tensor", "channel"])
@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_codes_and_scales_are_the_files(one_scale: bool, scale_dtype: Any, tmp_path: Path) -> None:
    saved = save(tmp_path, one_scale=one_scale, scale_dtype=scale_dtype)
    check(saved)
    with open_checkpoint(tmp_path) as checkpoint:
        form = CodeForm(8, 64, np.dtype(scale_dtype), has_input_scale=True, code_type=CodeType.E4M3)
        name = "compressed-tensors-w8a8-fp8"
        assert checkpoint.tensors[f"{UP}.weight"].encoding == Encoding(name, form, fixes_precision=True)
        rows = checkpoint.read_encoded(f"{UP}.weight", slice(3, 5))
        assert rows.input_scale == INPUT_SCALE
        np.testing.assert_array_equal(rows.codes, saved.weights[f"{UP}.weight"].codes[3:5])
        wrong = saved.weights[f"{UP}.weight"].codes.copy()
        wrong[4, 7] ^= 1
        assert (rows.codes != wrong[3:5]).sum() == 1


def test_scales_without_axes(tmp_path: Path) -> None:
    saved = save(tmp_path, one_scale=True)
    scale = saved.weights[f"{UP}.weight"].scales[0, 0]
    saved.change(**{f"{UP}.weight_scale": np.array(scale, np.float16), f"{UP}.input_scale": np.array(0.25, np.float32)})
    check(saved)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read_encoded(f"{UP}.weight", slice(0, 1)).input_scale == 0.25


def test_a_linear_that_stays_plain(tmp_path: Path) -> None:
    saved = save(tmp_path, names=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj"))
    saved.configure(config() | {"ignore": ["lm_head", "model.layers.0.mlp.down_proj"]})
    check(saved)


def floats(*shape: int) -> NDArray[Any]:
    return np.ones(shape, E4M3)


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "int8": ("weight", np.zeros((96, 64), np.int8), r"weight has .*dtype int8; accepted .*: \[96, 64\], float8_e4m3fn"),
    "plain": ("weight", np.zeros((96, 64), np.float16), "has a plain weight and input_scale, weight_scale"),
    "cut": ("weight", floats(95, 64), r"weight has shape \[95, 64\].*accepted .*: \[96, 64\], float8_e4m3fn"),
    "missing": ("weight", None, "weight is missing; the module has input_scale, weight_scale"),
    "scale missing": ("weight_scale", None, "weight_scale is missing"),
    "scale cut": ("weight_scale", np.ones((95, 1), np.float16), r"weight_scale has shape \[95, 1\]"),
    "scale flat": ("weight_scale", np.ones(96, np.float16), r"weight_scale has shape \[96\].*: \[96, 1\]"),
    "one scale": (
        "weight_scale",
        np.ones(1, np.float16),
        r"has shape \[1\]; accepted by the configuration .*: 8 bits in",
    ),
    "blocks": ("weight_scale", np.ones((3, 2), np.float16), r"weight_scale has shape \[3, 2\].*: \[96, 1\]"),
    "scale of codes": ("weight_scale", floats(96, 1), "weight_scale has .*dtype float8_e4m3fn; accepted"),
    "zero points": (
        "weight_zero_point",
        np.zeros((96, 1), np.int8),
        "weight_zero_point is of pack-quantized or int-qua",
    ),
    "packed": ("weight_packed", np.zeros((96, 16), np.int32), "weight_packed is of pack-quantized, and the config"),
    "no input scale": ("input_scale", None, "input_scale is missing"),
    "input scale 0": ("input_scale", np.zeros(1, np.float16), r"input_scale is 0\.0; accepted: a finite number above"),
    "input scale nan": ("input_scale", np.array([np.nan], np.float16), "input_scale is nan; accepted"),
    "input scales": ("input_scale", np.ones(2, np.float16), r"input_scale has shape \[2\].*: \[1\]"),
}


@pytest.mark.parametrize(("suffix", "array", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage(suffix: str, array: Any, message: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.change(**{f"{UP}.{suffix}": array})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_row_of_scales_where_there_should_be_one(tmp_path: Path) -> None:
    saved = save(tmp_path, one_scale=True)
    saved.change(**{f"{UP}.weight_scale": np.ones((96, 1), np.float16)})
    with pytest.raises(CheckpointError, match=r"has shape \[96, 1\]; accepted .*: one scale, with input_scale"):
        open_checkpoint(tmp_path)


def test_what_the_numbers_may_not_be(tmp_path: Path) -> None:
    """Found when the rows are read, and not before."""
    saved = save(tmp_path)
    codes = saved.weights[f"{UP}.weight"].codes.astype(np.uint8)
    codes[5, 9] = NAN | 0x80
    scales = saved.weights[f"{UP}.weight"].scales.copy()
    scales[7] *= -1
    for part, array, message in (
        ("weight", codes.view(E4M3), r"up_proj\.weight is NaN in row 5, column 9; accepted: numbers"),
        ("weight_scale", scales, r"up_proj\.weight_scale holds -\S+; accepted: numbers from 0 on"),
    ):
        saved.change(**{f"{UP}.{part}": array})
        with open_checkpoint(tmp_path) as checkpoint:
            checkpoint.read_encoded(f"{UP}.weight", slice(0, 5))
            with pytest.raises(CheckpointError, match=message):
                checkpoint.read_encoded(f"{UP}.weight", slice(4, 8))
        saved.change(**{f"{UP}.{name}": array for name, array in pack(saved.weights[f"{UP}.weight"]).items()})


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_float8_weights_of_another_method(method: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    facts: dict[str, Any] = {"sym": True} if method == "gptq" else {"version": "gemm", "zero_point": True}
    saved.configure({"quant_method": method, "bits": 4, "group_size": 32, **facts})
    with pytest.raises(CheckpointError, match="no tensor is; accepted"):
        open_checkpoint(tmp_path)


def test_block_wise_fp8_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    """As Qwen3's FP8 folders say it: scales of blocks, and inputs whose scales each step finds anew."""
    saved = save(tmp_path)
    saved.configure(
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"],
        }
    )
    accepted = "quantizes itself"
    with pytest.raises(CheckpointError, match=f'quant_method is "fp8"; not supported; accepted: .*{accepted}'):
        open_checkpoint(tmp_path)


REFUSED_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": ({"dynamic": True}, "input_activations: dynamic is true: each step would find its own scales; not"),
    "token": ({"strategy": "token"}, 'input_activations: strategy is "token"; not supported; accepted: "tensor"'),
    "asymmetric": ({"symmetric": False}, "input_activations: symmetric is false; not supported; accepted: true"),
    "4 bits": ({"num_bits": 4}, "input_activations: num_bits is 4; not supported; accepted: 8"),
    "int": ({"type": "int"}, 'input_activations: type is "int"; not supported; accepted: "float"'),
    "no type": ({"type": None}, 'input_activations: type is "int"; not supported; accepted: "float"'),
}


@pytest.mark.parametrize(("change", "message"), REFUSED_INPUTS.values(), ids=REFUSED_INPUTS)
def test_refused_inputs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f'config_groups, "group_0": {message}'):
        parse(config(INPUTS | change))


def test_weights_alone_are_refused() -> None:
    with pytest.raises(CheckpointError, match="input_activations is null: weights of float8 alone; not supported; acc"):
        parse(config(None))


REFUSED_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "4 bits": ({"num_bits": 4}, "num_bits is 4; not supported; accepted: 8"),
    "int": ({"type": "int"}, 'type is "int"; not supported; accepted: "float"'),
    "groups": ({"strategy": "group", "group_size": 32}, "group_size is 32; not supported with float-quantized"),
    "block": ({"strategy": "block", "block_structure": [128, 128]}, r"block_structure is \[128, 128\]; not supported"),
    "block alone": (
        {"strategy": "block"},
        "strategy is 'block'; not supported with float-quantized; accepted: channel,",
    ),
    "no strategy": ({"strategy": None}, "strategy is None; not supported with float-quantized; accepted: channel"),
    "asymmetric": ({"symmetric": False}, "symmetric is false; not supported with float-quantized; accepted: true"),
    "order": ({"actorder": "group"}, 'actorder is "group"; not supported with float-quantized; accepted: null'),
}


@pytest.mark.parametrize(("weights", "message"), REFUSED_WEIGHTS.values(), ids=REFUSED_WEIGHTS)
def test_refused_weights(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(config(**weights))


def test_a_group_of_the_other_format() -> None:
    found = config()
    found["config_groups"]["group_0"]["format"] = "int-quantized"
    with pytest.raises(CheckpointError, match='format is "int-quantized"; not supported; accepted: "float-quantized"'):
        parse(found)
