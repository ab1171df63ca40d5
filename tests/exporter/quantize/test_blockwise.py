"""Blockwise quantization: layout, error bounds, and that it is no worse than the plain way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.errors import ExportError
from qwen_aot.exporter.quantize.blockwise import (
    BLOCK_SIZES,
    BlockFormat,
    dequantize,
    pack,
    quantize,
    quantize_channels,
    unpack,
)

FORMATS = [
    BlockFormat(bits, size, symmetric) for bits in (4, 8) for size in (16, 32, 128) for symmetric in (True, False)
]
formats = pytest.mark.parametrize(
    "layout", FORMATS, ids=lambda f: f"{f.bits}b{f.block_size}{'s' if f.symmetric else 'z'}"
)


def weights(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Gaussian rows, a few of them with outliers."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, width)) * 0.02
    values[::3, :: max(1, width // 5)] *= 8
    return values.astype(np.float32)


def plain(rows: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Round to nearest with the scale that puts the largest element on the end of the range: what peers do."""
    half = 2 ** (bits - 1)
    result = np.empty_like(rows)
    for row, out in zip(rows, result, strict=True):
        for start in range(0, len(row), block):
            part = row[start : start + block]
            extreme = part[np.argmax(np.abs(part))]
            scale = extreme / -half
            out[start : start + block] = np.clip(np.rint(part / scale), -half, half - 1) * scale
    return result


@formats
@pytest.mark.parametrize("width", [7, 16, 96, 200])
def test_shapes_and_dtypes_for_widths_that_fill_no_whole_block(layout, width):
    n = -(-width // layout.block_size)
    quantized = quantize(weights(5, width), layout)
    assert quantized.codes.shape == (5, n, layout.block_size * layout.bits // 8)
    assert quantized.codes.dtype == np.uint8
    assert quantized.scales.shape == (5, n)
    assert quantized.scales.dtype == np.float32
    assert (quantized.zero_points is None) == layout.symmetric
    assert dequantize(quantized, layout, width).shape == (5, width)


@formats
def test_elements_beyond_the_width_stand_for_zero(layout):
    quantized = quantize(weights(4, 20), layout)
    whole = dequantize(quantized, layout, layout.blocks(20) * layout.block_size)
    np.testing.assert_array_equal(whole[:, 20:], 0)


@formats
def test_four_bits_put_the_earlier_element_in_the_lower_nibble(layout):
    rows = np.zeros((1, layout.block_size), np.float32)
    rows[0, 1] = 1.0  # the only element that isn't zero
    codes = quantize(rows, layout).codes[0, 0]
    zero_code = codes[-1]
    changed = np.flatnonzero(codes != zero_code)
    assert changed.tolist() == ([0] if layout.bits == 4 else [1])
    if layout.bits == 4:
        assert codes[0] & 15 == zero_code & 15


@formats
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), magnitude=st.floats(-25, 25))
def test_error_stays_within_a_step(layout, seed, magnitude):
    """Half a step inside the range; a whole one at the end that a zero point or the missing +2^(bits-1) cuts off."""
    rows = weights(3, 3 * layout.block_size, seed) * np.float32(10.0**magnitude)
    quantized = quantize(rows, layout)
    error = np.abs(dequantize(quantized, layout, rows.shape[1]) - rows)
    step = np.repeat(np.abs(quantized.scales), layout.block_size, axis=1)
    assert (step > 0).all()
    assert (error <= step * 1.001).all()
    assert (error <= step * 0.501).mean() > 0.9


@formats
def test_zero_rows_stay_zero(layout):
    rows = np.zeros((2, 64), np.float32)
    np.testing.assert_array_equal(dequantize(quantize(rows, layout), layout, 64), rows)


@formats
def test_a_row_is_quantized_the_same_whatever_stands_beside_it(layout):
    rows = weights(300, 300)  # more than one slice
    together, alone = quantize(rows, layout), quantize(rows[217:218], layout)
    np.testing.assert_array_equal(together.codes[217], alone.codes[0])
    np.testing.assert_array_equal(together.scales[217], alone.scales[0])


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_no_larger_than_that_of_plain_rounding(bits, block):
    rows = weights(40, 256)
    layout = BlockFormat(bits, block)
    ours = np.square(dequantize(quantize(rows, layout), layout, 256) - rows).sum()
    # At 8 bits, scales that fp16 holds cost up to 0.08 %.
    assert ours <= np.square(plain(rows, bits, block) - rows).sum() * 1.001


@pytest.mark.parametrize("bits", [4, 8])
def test_values_on_the_grid_survive(bits):
    layout = BlockFormat(bits, 32)
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(0).integers(-half, half, (6, 64))
    codes[:, ::32] = -half  # the end of the range is in use, so its scale is the grid's
    rows = (codes * 0.25).astype(np.float32)
    np.testing.assert_allclose(dequantize(quantize(rows, layout), layout, 64), rows, rtol=1e-6)


@given(codes=st.lists(st.integers(0, 15), min_size=1, max_size=40))
def test_unpack_undoes_pack(codes):
    array = np.array([codes], np.uint8)
    packed = pack(array, 4)
    assert packed.shape[-1] == -(-len(codes) // 2)
    np.testing.assert_array_equal(unpack(packed, 4)[:, : len(codes)], array)


def test_formats_that_no_kernel_takes_are_refused_with_the_ones_that_exist():
    with pytest.raises(ExportError, match="quantized to 3 bits; accepted: 4, 8"):
        BlockFormat(3, 32)
    with pytest.raises(ExportError, match=f"block size 48 doesn't exist; accepted: {', '.join(map(str, BLOCK_SIZES))}"):
        BlockFormat(4, 48)


def test_channels_hold_each_row_within_half_a_step_of_its_own_scale():
    rows = weights(7, 50)
    rows[3] = 0
    codes, scales = quantize_channels(rows)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(np.abs(codes).max(axis=1), [127, 127, 127, 0, 127, 127, 127])
    assert (np.abs(codes * scales[:, None] - rows) <= scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("size", [30000.0, 1.0, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_of_the_scale_that_fp16_holds(bits: int, symmetric: bool, size: float) -> None:
    """Scales of small blocks lose digits in fp16: rounded after the codes were made, they would shift every weight."""
    layout = BlockFormat(bits, 32, symmetric)
    rows = (np.random.default_rng(3).uniform(-1, 1, (8, 64)) * size).astype(np.float32)
    found = quantize(rows, layout, np.float16)
    np.testing.assert_array_equal(found.scales, found.scales.astype(np.float16).astype(np.float32))
    error = np.abs(dequantize(found, layout, 64) - rows).reshape(8, 2, 32).max(axis=2)
    steps = np.abs(found.scales)
    assert np.isfinite(error).all()
    assert (error <= steps * (1.0 if symmetric else 0.5) + 1e-3 * size).all()  # the shorter end is cut off by a step
    assert (steps <= size * 2.4 / ((1 << bits) - 1) * 1.2 + 6.1e-8).all()


@formats
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-60, 60))
def test_scales_are_such_as_fp16_holds_where_it_holds_them_closely(layout: BlockFormat, seed: int, power: int) -> None:
    """Beyond, they are what they would be: a model of very small or very large weights loses nothing."""
    rows = weights(3, 3 * layout.block_size, seed) * np.float32(2.0**power)
    scales = quantize(rows, layout).scales
    sizes = np.abs(scales)
    is_held = (sizes >= 2.0**-18) & (sizes <= 65504)
    np.testing.assert_array_equal(scales[is_held], scales[is_held].astype(np.float16).astype(np.float32))
    # A power of two moves fp32's scales and nothing else.
    wide = quantize((rows * np.float32(2.0 ** (-60 - power))).astype(np.float32), layout).scales
    exact = wide * np.float32(2.0 ** (60 + power))
    np.testing.assert_array_equal(
        scales[~is_held & (np.abs(exact) < 2.0**-18)], exact[~is_held & (np.abs(exact) < 2.0**-18)]
    )
    assert (np.abs(scales - exact) <= np.abs(exact) * 2.0**-6).all()
