"""The mended interpreter against PyTorch, where Triton's own is wrong."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.plugins.conftest import IS_INTERPRETED

if not IS_INTERPRETED:
    pytest.skip("kernels aren't interpreted here", allow_module_level=True)

from tests.plugins.interpreter import counting


@triton.jit
def _convert(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _multiply(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


@triton.jit
def _double(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x + x)


@triton.jit
def _first(x_ptr, count, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=offs < count, other=0.0), mask=offs < count)


@triton.jit
def _scalar_mask(x_ptr, is_on, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(x_ptr + offs, 0.0, mask=(offs < N) & (is_on != 0))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.int8, torch.bfloat16),
        (torch.int32, torch.bfloat16),
    ],
    ids=str,
)
def test_conversions(source, target):
    x = (torch.randn(1024, generator=torch.Generator().manual_seed(0)) * 100).to(source)
    if source.is_floating_point:
        x[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")]).to(source)
        x[4:6] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8]).to(source)  # ties, to even
    y = torch.empty(1024, dtype=target)
    _convert[(1,)](x, y, N=1024)
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)


def test_dot_of_bf16():
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    c = torch.empty(32, 32)
    _multiply[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_arithmetic_on_bf16_is_refused():
    with pytest.raises(InterpreterError, match="arithmetic on bf16"):
        _double[(1,)](torch.ones(16).bfloat16(), N=16)


@pytest.mark.parametrize("is_on", [0, 1])
def test_scalar_comparison_in_a_mask(is_on):
    x = torch.ones(16)
    _scalar_mask[(1,)](x, is_on, N=16)
    assert (x == 1 - is_on).all()


def test_bytes_are_those_of_unmasked_lanes():
    x = torch.ones(10, dtype=torch.float16)
    with counting({"x": x}) as traffic:
        _first[(3,)](x, 10, N=16)
    assert traffic.read == {"x": 3 * 10 * 2} and traffic.written == {"x": 3 * 10 * 2}
    with counting({"x": x}) as traffic:  # counts anew
        _first[(1,)](x, 0, N=16)
    assert not traffic.read and not traffic.written


def test_an_access_outside_is_an_error():
    x = torch.ones(16)
    with pytest.raises(InterpreterError, match="16 bytes beyond the end of x"), counting({"x": x[:12]}):
        _first[(1,)](x, 16, N=16)
    with pytest.raises(InterpreterError, match="in none of y"), counting({"y": torch.ones(4)}):
        _first[(1,)](x, 16, N=16)
