"""Symmetric forms: bounds that hold for any rows, edge rows, and PyTorch's own rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.exporter.quantize.symmetric import fp8_channels, int4_blocks, int8_channels
from qwen_aot.exporter.weights.recipe import OutOfRangeError
from tests.exporter import rounded

FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
UNIT = 2.0**-12


def rows_of(seed: int, rows: int, width: int, size: float) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * size).astype(np.float32)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 99), size=st.sampled_from([1e-3, 0.02, 1.0, 30.0]), dtype=st.sampled_from([FLOAT16, BFLOAT16])
)
def test_int8_is_within_half_a_step_of_every_weight(seed, size, dtype):
    rows = rows_of(seed, 5, 64, size)
    codes, scales = int8_channels(rows, UNIT, dtype)
    step = scales.astype(np.float32)[:, None] * np.float32(UNIT)
    assert codes.dtype == np.int8 and scales.dtype == dtype and np.abs(codes.astype(int)).max() <= 127
    # a scale rounded down cuts the largest elements off by at most its own rounding
    slack = 127 * step * float(ml_dtypes.finfo(dtype).eps)
    assert (np.abs(codes * step - rows) <= step / 2 + slack).all()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 99), size=st.sampled_from([0.02, 1.0]), block=st.sampled_from([32, 64, 128]))
def test_int4_is_no_worse_than_the_scale_that_reaches_every_weight(seed, size, block):
    rows = rows_of(seed, 4, 256, size)
    codes, scales = int4_blocks(rows, block, FLOAT16)
    assert codes.min() >= -8 and codes.max() <= 7 and scales.shape == (4, 256 // block) and (scales > 0).all()
    values = codes.reshape(4, -1, block) * scales.astype(np.float32)[..., None]
    blocks = rows.reshape(4, -1, block)
    plain = np.abs(blocks).max(2, keepdims=True) / 8
    naive = np.clip(np.rint(blocks / plain), -8, 7) * plain
    assert (((values - blocks) ** 2).sum(2) <= ((naive - blocks) ** 2).sum(2) * 1.02 + 1e-12).all()  # 1.02: fp16 scales


def test_fp8_codes_are_pytorchs():
    rows = rows_of(0, 6, 96, 0.02)
    codes, scales = fp8_channels(rows, 2.0**-14, FLOAT16)
    got = codes.astype(np.float32) * (scales.astype(np.float32) * np.float32(2.0**-14))[:, None]
    want = rounded.fp8(torch.tensor(rows)).numpy()
    close = np.abs(got - want) <= 1e-6
    assert close.mean() > 0.99  # the rest: ties that a division and a multiplication round apart
    np.testing.assert_allclose(got, want, rtol=2**-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_rows_of_zeros_have_a_scale_above_zero(dtype):
    zeros = np.zeros((2, 128), np.float32)
    for codes, scales in (
        int8_channels(zeros, UNIT, dtype),
        fp8_channels(zeros, UNIT, dtype),
        int4_blocks(zeros, 128, dtype),
    ):
        assert not codes.astype(np.float32).any()
        assert (scales.astype(np.float32) > 0).all()


@pytest.mark.parametrize(
    ("quantize", "unit", "largest"),
    [(int8_channels, 2.0**-12, 2031.0), (fp8_channels, 2.0**-14, 1791.1), (int8_channels, 1.0, 8.319e6)],
    ids=["int8", "fp8", "int8 experts"],
)
def test_a_row_beyond_fp16_scales_is_named_and_one_below_is_right(quantize, unit, largest):
    rows = rows_of(0, 5, 64, 0.02)
    rows[3, 7] = -largest
    codes, scales = quantize(rows, unit, FLOAT16)
    values = codes.astype(np.float32) * scales.astype(np.float32)[:, None] * np.float32(unit)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values[3, 7], -largest, rtol=0.01)
    rows[3, 7] = -largest * 1.001
    with pytest.raises(OutOfRangeError, match=r"magnitude \S+ need a scale that float16 doesn't hold") as caught:
        quantize(rows, unit, FLOAT16)
    assert caught.value.row == 3
    quantize(rows, unit, BFLOAT16)


def test_a_row_beyond_bf16_scales_is_named():
    rows = np.full((2, 64), 3e38, np.float32)
    with pytest.raises(OutOfRangeError, match=r"magnitude 3e\+38 need a scale that bfloat16 doesn't hold"):
        int8_channels(rows, UNIT, BFLOAT16)


@pytest.mark.parametrize("size", [1e-3, 1e-4, 3e-5, 1e-5])
def test_rows_whose_scales_fp16_holds_badly_lose_no_more_than_half_a_step(size):
    """Experts' int8 scales, which have no unit: 127 steps of 6e-8, fp16's smallest, are 7.6e-6."""
    rows = rows_of(1, 16, 64, size)
    codes, scales = int8_channels(rows, 1.0, FLOAT16)
    step = scales.astype(np.float32)[:, None]
    assert (np.abs(codes * step - rows) <= step / 2 * 1.001).all()
    assert (step[:, 0] <= np.abs(rows).max(axis=1) / 127 + 6e-8).all()
    codes, scales = int4_blocks(rows, 32, FLOAT16)
    step = np.repeat(scales.astype(np.float32), 32, axis=1)
    assert (np.abs(codes * step - rows) <= step * 1.001).all()
