"""AWQ folders, against codes packed word by word (`tests.quantized_files`)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, Encoding
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.exporter.checkpoint.hf.quantized.test_gptq import check
from tests.quantized_files import Saved, awq, awq_config, random_codes, save_quantized

UP = "model.layers.0.mlp.up_proj"
ASYMMETRIC = functools.partial(random_codes, symmetric=False, smallest_zero=0)


def save(folder: Path, make: Any = ASYMMETRIC, **config: Any) -> Saved:
    return save_quantized(folder, awq_config(**config), awq, make=make)


@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_effective_weights_are_exact(group_size: int, tmp_path: Path) -> None:
    saved = save(tmp_path, functools.partial(ASYMMETRIC, group_size=group_size), group_size=group_size)
    zeros = np.concatenate([weight.zeros.ravel() for weight in saved.weights.values()])
    assert {0, 15} <= set(zeros.tolist())
    check(saved)
    with open_checkpoint(tmp_path) as checkpoint:
        form = CodeForm(4, 64 if group_size == -1 else group_size, np.dtype(np.float16), has_zero_points=True)
        assert checkpoint.tensors[f"{UP}.weight"].encoding == Encoding("awq-int4", form, fixes_precision=True)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 18), slice(7, 8), slice(40, 99), slice(3, 3), slice(20, 2, -3)])
def test_rows(rows: slice, tmp_path: Path) -> None:
    weight = save(tmp_path).weights[f"{UP}.weight"]
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(f"{UP}.weight", rows), weight.values[rows])
        encoded = checkpoint.read_encoded(f"{UP}.weight", rows)
        np.testing.assert_array_equal(encoded.codes, weight.codes[rows])
        np.testing.assert_array_equal(encoded.zero_points, weight.zeros[rows])


def test_experts(tmp_path: Path) -> None:
    moe = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    check(save_quantized(tmp_path, awq_config(modules_to_not_convert=["mlp.gate"]), awq, make=ASYMMETRIC, moe=moe))


def test_without_zero_points(tmp_path: Path) -> None:
    saved = save(tmp_path, random_codes, zero_point=False)
    check(saved)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read_encoded(f"{UP}.weight").zero_points is None
    saved.weights[f"{UP}.weight"].zeros[3, 1] = 7
    saved.change(**{f"{UP}.qzeros": awq(saved.weights[f"{UP}.weight"])["qzeros"]})
    with pytest.raises(CheckpointError, match=rf"{UP}\.qzeros has zeros other than 8, and zero_point is false"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("modules", [["down_proj"], ["model.layers.0"], ["mlp.down_proj", "lm_head"]])
def test_a_module_that_is_said_to_be_plain(modules: list[str], tmp_path: Path) -> None:
    save(tmp_path, modules_to_not_convert=modules)
    with pytest.raises(CheckpointError, match="although modules_to_not_convert has '"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("modules", [None, [], ["lm_head", "gate", "layers.1", "proj"]])
def test_names_that_no_quantized_module_has(modules: list[str] | None, tmp_path: Path) -> None:
    check(save(tmp_path, modules_to_not_convert=modules))


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "qweight as GPTQ": ("qweight", np.zeros((8, 96), np.int32), r"qweight has .*accepted .*: \[64, 12\], int32"),
    "qweight int16 of gemv_fast": ("qweight", np.zeros((16, 64), np.int16), "has dtype 'I16'; accepted: F64"),
    "qzeros missing": ("qzeros", None, "qzeros is missing; the module has qweight, scales"),
    "qzeros of other groups": ("qzeros", np.zeros((4, 12), np.int32), r"qzeros has .*accepted .*: \[2, 12\]"),
    "scales of other groups": ("scales", np.ones((4, 96), np.float16), "its scales 4 groups; accepted by the conf"),
}


@pytest.mark.parametrize(("suffix", "array", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage(suffix: str, array: Any, message: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.change(**{f"{UP}.{suffix}": array})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_columns_that_do_not_fill_words(tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, awq_config(), awq, names=("up_proj",))
    saved.configure(awq_config(), intermediate_size=92)
    with pytest.raises(CheckpointError, match="is of 92 columns of 4 bits, which don't fill whole 32-bit words"):
        open_checkpoint(tmp_path)
