"""Integer codes as floating-point numbers, without the instruction that converts them.

`I2F` runs at an eighth of the rate of arithmetic, and would bound kernels with integer weights or caches wherever SMs
are few against their bandwidth. A code in the last bits of 2^23 makes an fp32 number that is larger by just the code:
one logical operation and one subtraction. In fp16 and bf16 the same goes for two codes at once: a byte beside the upper
byte of 1024 (fp16) or of 128 (bf16) is that number and the byte, as long as the byte fits the mantissa, and one byte
permutation puts two of them in place. Source: Kim et al., "Who Says Elephants Can't Run" (arXiv 2211.10017), section 3.
"""

import triton
import triton.language as tl

# Whether kernels of this process run in Triton's interpreter, which can't run inline PTX.
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
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
def _widen_int4_in_steps(packed, zero, dtype: tl.constexpr):
    """`widen_int4` in Triton's own operations: the definition, which the interpreter runs."""
    word = packed.to(tl.uint8, bitcast=True).to(tl.int32)
    low = ((word & 15) | _BITS).to(tl.float32, bitcast=True) - (_LOW + zero)
    high = ((word & 240) | _BITS).to(tl.float32, bitcast=True) * 0.0625 - (_HIGH + zero)
    return low.to(dtype), high.to(dtype)


@triton.jit
def widen_int4(packed, zero, dtype: tl.constexpr):
    """Low and high nibbles of bytes [N, K/2], each less zero [N, 1] (fp32, an integer in 0 … 16), in `dtype`, exact.

    fp16: the low nibble over 1024 less 1024 and the zero; the high one, which counts sixteens, by a multiply-add. bf16:
    7 bits of mantissa behind 128 hold a nibble, and no byte, so that high nibbles are shifted down first.
    """
    if _IS_INTERPRETED:
        return _widen_int4_in_steps(packed, zero, dtype)
    elif dtype == tl.float16:
        bias = tl.broadcast_to((-1024.0 - zero).to(tl.float16), packed.shape)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, pair, sixteenth, offset, bias;
            mov.b32 sixteenth, 0x2c002c00;
            mov.b32 offset, 0x63806380;
            and.b32 low, $4, 0x0f0f0f0f;
            and.b32 high, $4, 0xf0f0f0f0;
            prmt.b32 pair, low, 0x64, 0x4140;
            add.f16x2 $0, pair, $5;
            prmt.b32 pair, low, 0x64, 0x4342;
            add.f16x2 $1, pair, $6;
            add.f16x2 bias, $5, offset;
            prmt.b32 pair, high, 0x64, 0x4140;
            fma.rn.f16x2 $2, pair, sixteenth, bias;
            add.f16x2 bias, $6, offset;
            prmt.b32 pair, high, 0x64, 0x4342;
            fma.rn.f16x2 $3, pair, sixteenth, bias;
            }""",
            "=r,=r,=r,=r,r,r,r",
            [packed, bias],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        bias = tl.broadcast_to((-128.0 - zero).to(tl.bfloat16), packed.shape)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, pair, one;
            mov.b32 one, 0x3f803f80;
            and.b32 low, $4, 0x0f0f0f0f;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0f0f0f0f;
            prmt.b32 pair, low, 0x43, 0x4140;
            fma.rn.bf16x2 $0, pair, one, $5;
            prmt.b32 pair, low, 0x43, 0x4342;
            fma.rn.bf16x2 $1, pair, one, $6;
            prmt.b32 pair, high, 0x43, 0x4140;
            fma.rn.bf16x2 $2, pair, one, $5;
            prmt.b32 pair, high, 0x43, 0x4342;
            fma.rn.bf16x2 $3, pair, one, $6;
            }""",
            "=r,=r,=r,=r,r,r,r",
            [packed, bias],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
