"""Codes carried into a block format: no value changes, and what doesn't fit is named."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.quantize import blockwise
from qwen_aot.exporter.quantize.blockwise import BLOCK_SIZES, BlockFormat
from qwen_aot.exporter.quantize.encoded import as_blocks, as_scales, in_form_of, nearest_scales, obstacle
from qwen_aot.exporter.weights.recipe import OutOfRangeError
from tests.exporter.checkpoint.test_encoding import FORMS, by_hand, random_rows

HALF = np.dtype(np.float16)
LAYOUTS = st.builds(
    BlockFormat, bits=st.sampled_from([4, 8]), block_size=st.sampled_from(BLOCK_SIZES), symmetric=st.booleans()
)


@example(form=CodeForm(8, 32, HALF), layout=BlockFormat(8, 16), rows=3, width=100)
@example(form=CodeForm(4, 32, HALF), layout=BlockFormat(8, 16), rows=3, width=100)
@example(form=CodeForm(3, 64, HALF, has_zero_points=True), layout=BlockFormat(4, 32, symmetric=False), rows=2, width=90)
@settings(suppress_health_check=[HealthCheck.filter_too_much])  # most pairs don't fit, and few runs draw many that do
@given(form=FORMS, layout=LAYOUTS, rows=st.integers(1, 3), width=st.integers(1, 300))
def test_what_fits_keeps_every_value(form, layout, rows, width):
    assume(obstacle(form, width, layout, np.float32) is None)
    encoded = random_rows(form, rows, width)
    blocks = as_blocks(in_form_of(layout, encoded), layout)
    assert blocks.codes.shape == (rows, layout.blocks(width), layout.block_bytes)
    np.testing.assert_array_equal(blockwise.dequantize(blocks, layout, width), by_hand(encoded))
    whole = layout.blocks(width) * layout.block_size
    np.testing.assert_array_equal(blockwise.dequantize(blocks, layout, whole)[:, width:], 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_the_same_form_are_taken_as_they_are(bits):
    encoded = random_rows(CodeForm(bits, 32, HALF), 3, 96)
    blocks = as_blocks(in_form_of(BlockFormat(bits, 32), encoded), BlockFormat(bits, 32))
    stored = encoded.codes if bits == 8 else encoded.codes[:, ::2] | encoded.codes[:, 1::2] << np.uint8(4)
    np.testing.assert_array_equal(blocks.codes.reshape(3, -1), stored)
    np.testing.assert_array_equal(blocks.scales, encoded.scales.astype(np.float32))
    assert blocks.zero_points is None


@pytest.mark.parametrize(
    ("form", "layout", "scales", "reason"),
    [
        (CodeForm(8, 32, HALF), BlockFormat(8, 32), np.float16, None),
        (CodeForm(4, 32, HALF), BlockFormat(8, 16), np.float32, None),
        (CodeForm(8, 100, HALF), BlockFormat(8, 64), np.float32, None),  # one group a row
        (CodeForm(4, 32, HALF, has_zero_points=True), BlockFormat(4, 32, symmetric=False), np.float32, None),
        (CodeForm(8, 32, HALF), BlockFormat(4, 32), np.float32, "8 bits in blocks of 32 don't fit 4 bits in blocks"),
        (CodeForm(4, 32, HALF), BlockFormat(4, 64), np.float32, "4 bits in blocks of 32 don't fit 4 bits in blocks of"),
        (CodeForm(4, 24, HALF), BlockFormat(4, 16), np.float32, "blocks of 24 don't fit"),
        (CodeForm(4, 32, HALF, has_zero_points=True), BlockFormat(8, 32), np.float32, "they have zero points"),
        (CodeForm(4, 32, HALF, has_permutation=True), BlockFormat(4, 32), np.float32, "columns are in another order"),
        (CodeForm(4, 32, np.dtype(np.float32)), BlockFormat(4, 32), np.float16, "float32 scales don't fit float16"),
        (CodeForm(4, 32, np.dtype(ml_dtypes.bfloat16)), BlockFormat(4, 32), np.float16, None),  # by type; see as_scales
        (CodeForm(4, 32, np.dtype(ml_dtypes.bfloat16)), BlockFormat(4, 32), np.float32, None),
    ],
)
def test_what_does_not_fit_is_named(form, layout, scales, reason):
    found = obstacle(form, 100, layout, scales)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("scale", [0.0, 1.0, -(2.0**-24), 0.0041, 65280.0])
def test_scales_of_bfloat16_are_the_same_in_float16(scale):
    scales = np.full((2, 3), scale, ml_dtypes.bfloat16)
    cast = as_scales(scales, np.float16)
    assert cast.dtype == np.float16
    np.testing.assert_array_equal(cast.astype(np.float32), scales.astype(np.float32))


@pytest.mark.parametrize("scale", [65536.0, -(2.0**-25), 1.1e-7])
def test_scales_beyond_float16_are_refused_by_their_place(scale):
    scales = np.full((4, 3), 0.5, ml_dtypes.bfloat16)
    scales[2, 1] = scale
    with pytest.raises(OutOfRangeError, match=r"is no float16 number.*target cpu takes all") as caught:
        as_scales(scales, np.float16, first_row=7)
    assert caught.value.row == 9


@pytest.mark.parametrize("unit", [1.0, 2.0**-14])
def test_scales_of_next_to_nothing_are_the_nearest_of_the_type(unit):
    """A change of a weight by half of float16's smallest number, 2^-25, is one too many."""
    fine = np.float32(unit * 2.0**-24 * 1.25)  # a quarter of the smallest scale is lost, times what a code is
    scales = np.array([[1e-12], [0.0], [fine], [fine], [100.0], [1.1]], np.float32)
    lost = np.float32(unit) * 2.0**-26
    largest = np.array([[448], [448], [2.0**-26 / lost], [2.0**-25 / lost], [0], [448]], np.float32)
    found = nearest_scales(scales, np.float16, lambda: largest, unit)
    held = np.float16(100.0 / unit) if unit == 1 else np.float16(0)  # 100 is beyond float16 times 2^-14
    want = [0, 0, unit * 2.0**-24, fine, held * unit, np.float32(1.1)]
    np.testing.assert_array_equal(found[:, 0], np.array(want, np.float32))

    def never():
        raise AssertionError("all of these are numbers of the type")

    np.testing.assert_array_equal(nearest_scales(np.array([[0.5]]), np.float16, never), [[0.5]])
