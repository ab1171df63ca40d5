"""The canonical form of codes, against a definition spelled out element by element."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, EncodedRows, arranged, dequantize, stack
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model.variants import VARIANTS
from tests import e4m3
from tests.checkpoints import save_tiny

SCALES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
FORMS = st.builds(
    CodeForm,
    bits=st.integers(1, 8),
    group_size=st.sampled_from([1, 3, 16, 32, 64, 128]),
    scale_dtype=st.sampled_from(SCALES),
    has_zero_points=st.booleans(),
    has_permutation=st.booleans(),
)


def random_rows(form: CodeForm, rows: int, width: int, seed: int = 0) -> EncodedRows:
    rng = np.random.default_rng(seed)
    groups = -(-width // form.group_size)
    codes = rng.integers(0, 1 << form.bits, (rows, width), np.uint8)
    zeros = rng.integers(0, 1 << form.bits, (rows, groups), np.uint8)
    return EncodedRows(
        form,
        codes,
        rng.normal(size=(rows, groups)).astype(form.scale_dtype),
        zeros if form.has_zero_points else None,
        np.random.default_rng(99).permutation(width) if form.has_permutation else None,
    )


def by_hand(rows: EncodedRows) -> np.ndarray:
    values = np.full(rows.codes.shape, np.nan, np.float32)
    for r, k in np.ndindex(rows.codes.shape):
        group = k // rows.form.group_size
        zero = 2 ** (rows.form.bits - 1) if rows.zero_points is None else int(rows.zero_points[r, group])
        column = k if rows.permutation is None else rows.permutation[k]
        values[r, column] = np.float32(int(rows.codes[r, k]) - zero) * np.float32(rows.scales[r, group])
    return values


@given(form=FORMS, rows=st.integers(1, 5), width=st.integers(1, 70))
def test_codes_stand_for_what_the_definition_says(form, rows, width):
    encoded = random_rows(form, rows, width)
    np.testing.assert_array_equal(dequantize(encoded), by_hand(encoded))


@pytest.mark.parametrize("group_size", [253, 100, 11])
def test_codes_of_e4m3_are_the_formats_numbers(group_size):
    """All 254 of them but NaN, in groups that fill a row and in some that don't."""
    form = CodeForm(8, group_size, np.dtype(np.float32), code_type=CodeType.E4M3)
    codes = np.array([e4m3.CODES] * 2, np.uint8)
    groups = -(-codes.shape[1] // group_size)
    scales = np.arange(1, 2 * groups + 1, dtype=np.float32).reshape(2, groups) / 7
    want = np.array(e4m3.NUMBERS, np.float32) * np.repeat(scales, group_size, 1)[:, : codes.shape[1]]
    found = dequantize(EncodedRows(form, codes, scales))
    np.testing.assert_array_equal(found, want)
    assert (found != dequantize(EncodedRows(replace(form, code_type=CodeType.INTEGER), codes, scales))).any()
    assert form.largest_number == max(e4m3.NUMBERS)
    assert e4m3.number(form.middle) == 0


def test_rows_that_are_added_are_zeros_of_their_type():
    form = CodeForm(8, 4, np.dtype(np.float16), code_type=CodeType.E4M3)
    rows = EncodedRows(form, np.full((1, 4), 0x38, np.uint8), np.ones((1, 1), np.float16))
    found = arranged(rows, lambda array, fill: np.concatenate((np.full_like(array, fill), array)))
    np.testing.assert_array_equal(dequantize(found), [[0] * 4, [1] * 4])


def test_one_changed_code_or_scale_is_seen():
    encoded = random_rows(CodeForm(4, 16, SCALES[0]), 2, 32)
    codes, scales = encoded.codes.copy(), encoded.scales.copy()
    codes[1, 20] ^= 1
    scales[0, 1] *= 2
    for changed in (replace(encoded, codes=codes), replace(encoded, scales=scales)):
        assert not np.array_equal(dequantize(changed), by_hand(encoded))


@given(form=FORMS, counts=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_stack_has_the_rows_of_its_parts(form, counts):
    parts = [random_rows(form, count, 40, seed) for seed, count in enumerate(counts)]
    np.testing.assert_array_equal(dequantize(stack(parts)), np.concatenate([by_hand(part) for part in parts]))


def test_matrices_of_different_column_orders_are_not_stacked():
    first, second = (random_rows(CodeForm(4, 16, SCALES[0], has_permutation=True), 2, 32, seed) for seed in (0, 1))
    assert second.permutation is not None
    with pytest.raises(CheckpointError, match="have their columns in different orders"):
        stack([first, replace(second, permutation=second.permutation[::-1])])


@pytest.mark.parametrize("has_zero_points", [False, True])
def test_rows_that_an_order_adds_stand_for_zero(has_zero_points):
    encoded = random_rows(CodeForm(4, 16, SCALES[0], has_zero_points=has_zero_points), 3, 32)

    def backwards_and_one_more(rows, fill):
        return np.concatenate((rows[::-1], np.full_like(rows[:1], fill)))

    values = dequantize(arranged(encoded, backwards_and_one_more))
    np.testing.assert_array_equal(values[:3], by_hand(encoded)[::-1])
    np.testing.assert_array_equal(values[3:], 0)


def test_checkpoints_of_plain_numbers_have_no_codes(tmp_path):
    save_tiny(tmp_path, layers=1)
    name = "model.embed_tokens.weight"
    random = RandomCheckpoint(VARIANTS["qwen1.5-0.5b"])
    with open_checkpoint(tmp_path) as folder:
        for checkpoint in (folder, random):
            assert all(info.encoding is None for info in checkpoint.tensors.values())
            with pytest.raises(CheckpointError, match=f"{name}' isn't stored as codes that can be read"):
                checkpoint.read_encoded(name)
