"""Integer codes as floating-point numbers, without the instruction that converts them.

`I2F` runs at an eighth of the rate of arithmetic, and would bound kernels with integer weights or caches wherever SMs
are few against their bandwidth. A code in the last bits of 2^23 makes an fp32 number that is larger by just the code:
one logical operation and one subtraction.
"""

import triton
import triton.language as tl

_BITS = tl.constexpr(0x4B000000)  # of 2^23
_BYTE = tl.constexpr(8388608.0 + 128)
_LOW = tl.constexpr(8388608.0)  # 2^23
_HIGH = tl.constexpr(524288.0)  # 2^23 / 16: the high nibble counts sixteens


@triton.jit
def widen_int8(codes, dtype: tl.constexpr):
    """int8 in `dtype` (fp16, bf16 or fp32), exact."""
    bits = (codes.to(tl.int32) & 255) ^ (_BITS + 128)  # the sign's bit turned: code + 128
    return (bits.to(tl.float32, bitcast=True) - _BYTE).to(dtype)


@triton.jit
def widen_int4(packed, zero, dtype: tl.constexpr):
    """Low and high nibbles of bytes [N, K/2], each less zero [N] (fp32, an integer), in `dtype`, exact."""
    word = packed.to(tl.uint8, bitcast=True).to(tl.int32)
    low = ((word & 15) | _BITS).to(tl.float32, bitcast=True) - (_LOW + zero[:, None])
    high = ((word & 240) | _BITS).to(tl.float32, bitcast=True) * 0.0625 - (_HIGH + zero[:, None])
    return low.to(dtype), high.to(dtype)
