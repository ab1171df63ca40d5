"""How far a kernel may be from its reference, in one table.

An error is measured against the largest magnitude of the reference's row, because a sum that cancels keeps the rounding
of its terms.
"""

import torch

# fp16 keeps 11 bits, bf16 8: half a unit in the last place is 2^-11 and 2^-8 relative to a power of two.
# Attention rounds q (with the reference), the softmax weights and the output: weights err by half a unit each and
# average out, the output by half a unit: 2 units of headroom. Experts round the inner activation where the reference
# does; a sum in another order moves some of those roundings by a whole unit, and the output rounds once more.
_UNIT = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
UNITS = 2.0


def assert_same_cache(actual: torch.Tensor, expected: torch.Tensor, *, is_exact: bool) -> None:
    """Codes, values or scales of a cache after a step, with what it didn't touch, NaN included.

    Args:
        actual: on the CPU.
        expected: of the reference.
        is_exact: else one step of the type is allowed: a GPU fuses products into sums, and the sum of a norm has no
            order, so that a result may land on the other side of a rounding.
    """
    tolerance = {"atol": 0.0, "rtol": 0.0}
    if not is_exact:
        tolerance = {"atol": 1.0, "rtol": 0.0} if expected.dtype == torch.int8 else {"atol": 1e-3, "rtol": 2.0**-7}
    torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Every element of `actual` within the bound of its dtype, and none missing."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    actual, unit = actual.cpu(), _UNIT[expected.dtype]
    assert torch.isfinite(actual).all(), f"{int((~torch.isfinite(actual)).sum())} elements were not written"
    row = expected.float().abs().amax(dim=-1, keepdim=True)
    error = ((actual.float() - expected.float()).abs() / row.clamp(min=1e-3)).max().item()
    assert error <= UNITS * unit, f"off by {error / unit:.2f} units of {expected.dtype}"
