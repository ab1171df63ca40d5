"""compressed-tensors folders, against codes packed word by word (`tests.quantized_files`)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, Encoding
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.exporter.checkpoint.hf.quantized.test_gptq import check
from tests.quantized_files import (
    Saved,
    compressed_tensors,
    compressed_tensors_config,
    random_codes,
    save_quantized,
)

UP = "model.layers.0.mlp.up_proj"


def save(
    folder: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    scale_dtype: Any = np.float16,
    **config: Any,
) -> Saved:
    weights = {
        "num_bits": bits,
        "group_size": None if group_size == -1 else group_size,
        "strategy": "channel" if group_size == -1 else "group",
        "symmetric": symmetric,
        "actorder": "group" if act_order else None,
    }
    make = functools.partial(
        random_codes,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        shuffled=act_order,
        smallest_zero=0,
        scale_dtype=scale_dtype,
    )
    pack = functools.partial(compressed_tensors, symmetric=symmetric, act_order=act_order)
    return save_quantized(folder, compressed_tensors_config(weights), pack, make=make, **config)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_effective_weights_are_exact(
    bits: int, group_size: int, symmetric: bool, act_order: bool, tmp_path: Path
) -> None:
    check(save(tmp_path, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order))
    with open_checkpoint(tmp_path) as checkpoint:
        has_permutation = act_order and group_size != -1
        form = CodeForm(
            bits, 64 if group_size == -1 else group_size, np.dtype(np.float16), not symmetric, has_permutation
        )
        assert checkpoint.tensors[f"{UP}.weight"].encoding == Encoding(f"compressed-tensors-w{bits}a16", form, True)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 18), slice(7, 8), slice(40, 99), slice(3, 3), slice(20, 2, -3)])
def test_rows(rows: slice, tmp_path: Path) -> None:
    weight = save(tmp_path, symmetric=False, act_order=True).weights[f"{UP}.weight"]
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(f"{UP}.weight", rows), weight.values[rows])
        encoded = checkpoint.read_encoded(f"{UP}.weight", rows)
        assert encoded.permutation is not None
        np.testing.assert_array_equal(encoded.codes, weight.codes[rows][:, encoded.permutation])
        np.testing.assert_array_equal(encoded.zero_points, weight.zeros[rows])


def test_bf16_as_llm_compressor_saves_it(tmp_path: Path) -> None:
    check(save(tmp_path, scale_dtype=ml_dtypes.bfloat16))


@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_that_fill_no_words(bits: int, tmp_path: Path) -> None:
    """K is 30 and N 90 of some, 45 of others: no multiple of 8 or 4."""
    shape: dict[str, Any] = {"hidden": 30, "heads": 3, "kv_heads": 3, "intermediate": 45}
    check(save(tmp_path, bits=bits, group_size=-1, symmetric=False, **shape))


def test_experts(tmp_path: Path) -> None:
    moe = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate")
    saved = save(tmp_path, moe=moe, names=names)
    assert "model.layers.0.mlp.gate.weight" in saved.weights  # nothing keeps a configuration from it
    check(saved)


def test_groups_of_several_schemes(tmp_path: Path) -> None:
    first = compressed_tensors_config()["config_groups"]["group_0"]
    second = {**first, "targets": ["re:.*mlp.*"], "weights": first["weights"] | {"num_bits": 8, "symmetric": False}}

    def make(n: int, k: int, *, seed: int) -> Any:
        return random_codes(n, k, bits=8 if n == 96 else 4, symmetric=n != 96, smallest_zero=0, seed=seed)

    def pack(weight: Any) -> Any:
        return compressed_tensors(weight, symmetric=weight.bits == 4)

    config = compressed_tensors_config(config_groups={"a": first, "b": second})
    check(save_quantized(tmp_path, config, pack, make=make))
    with open_checkpoint(tmp_path) as checkpoint:
        encodings = {info.encoding.name for info in checkpoint.tensors.values() if info.encoding is not None}
        assert encodings == {"compressed-tensors-w4a16", "compressed-tensors-w8a16"}


def test_a_module_that_is_said_to_be_plain(tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.configure(compressed_tensors_config(ignore=["re:.*gate$", UP]))
    with pytest.raises(
        CheckpointError, match=rf"has weight_packed, weight_scale, weight_shape, although ignore has '{UP}"
    ):
        open_checkpoint(tmp_path)


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "packed int64": ("weight_packed", np.zeros((96, 8), np.int64), "weight_packed has .*dtype int64; accepted"),
    "packed flat": ("weight_packed", np.zeros(768, np.int32), "weight_packed of a weight .* has 0 words"),
    "packed cut": ("weight_packed", np.zeros((95, 8), np.int32), r"weight_packed has .*accepted .*: \[96, 8\]"),
    "packed missing": ("weight_packed", None, "weight_packed is missing; the module has weight_scale, weight_shape"),
    "scale missing": ("weight_scale", None, "weight_scale is missing"),
    "scale of other groups": ("weight_scale", np.ones((96, 3), np.float16), "its scales 3 groups; accepted by"),
    "shape missing": ("weight_shape", None, "weight_shape is missing"),
    "shape of another weight": (
        "weight_shape",
        np.array([64, 96]),
        r"weight_shape holds \[64, 96\]; accepted: \[96, 64\]",
    ),
    "shape of three": ("weight_shape", np.array([1, 96, 64]), r"weight_shape has shape \[3\]"),
    "shape float": ("weight_shape", np.array([96.0, 64.0]), "weight_shape has .*dtype float64"),
    "zero points": (
        "weight_zero_point",
        np.zeros((12, 2), np.int32),
        "has weight_zero_point and no weight_g_idx beside",
    ),
    "groups": ("weight_g_idx", np.zeros(64, np.int32), "has no weight_zero_point and weight_g_idx beside"),
    "fp8": ("weight_packed", np.zeros((96, 8), np.uint8), "weight_packed' has dtype 'U8'; accepted: F64"),
}


@pytest.mark.parametrize(("suffix", "array", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage(suffix: str, array: Any, message: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.change(**{f"{UP}.{suffix}": array})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_zero_points_of_another_shape(tmp_path: Path) -> None:
    saved = save(tmp_path, symmetric=False)
    saved.change(**{f"{UP}.weight_zero_point": np.zeros((2, 12), np.int32)})
    with pytest.raises(CheckpointError, match=r"weight_zero_point has shape \[2, 12\] .*accepted .*: \[12, 2\], int32"):
        open_checkpoint(tmp_path)
    saved.change(**{f"{UP}.weight_zero_point": None})
    with pytest.raises(CheckpointError, match="has no weight_zero_point and no weight_g_idx beside it; no group"):
        open_checkpoint(tmp_path)
