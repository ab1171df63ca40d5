"""GGUF's quantized types as codes.

A type's value is code * scale - minimum, or (code - middle) * scale where it has no minimums. The first is the second
with an offset of middle * scale - minimum for each group.

Source: the block structs of ggml (`ggml-common.h`); the gguf package's `quants` is what tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows, Encoding

_HALF = np.dtype("<f2")
_FLOAT = np.dtype(np.float32)
_Blocks = NDArray[np.uint8]  # [r, blocks, bytes of a block]


@dataclass(frozen=True, slots=True)
class _Parts:
    """Codes [r, blocks, elements], scales [r, blocks, groups], and what is added to code * scale, likewise."""

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    minimums: NDArray[Any] | None = None


def _q8_0(blocks: _Blocks) -> _Parts:
    """fp16 scale, 32 signed bytes: -128 becomes code 0."""
    return _Parts(blocks[..., 2:] ^ np.uint8(0x80), _half(blocks, 0))


def _q4_0(blocks: _Blocks) -> _Parts:
    """fp16 scale, 16 bytes: low nibbles are elements 0 to 15, high ones 16 to 31."""
    return _Parts(_nibbles(blocks[..., 2:]), _half(blocks, 0))


def _q4_1(blocks: _Blocks) -> _Parts:
    """fp16 scale and minimum, nibbles as in Q4_0."""
    return _Parts(_nibbles(blocks[..., 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: _Blocks) -> _Parts:
    """fp16 scale, 4 bytes with the fifth bit of each element, nibbles as in Q4_0."""
    return _Parts(_with_fifth_bit(blocks, 2), _half(blocks, 0))


def _q5_1(blocks: _Blocks) -> _Parts:
    """fp16 scale and minimum, the rest as in Q5_0."""
    return _Parts(_with_fifth_bit(blocks, 4), _half(blocks, 0), _half(blocks, 2))


def _q2_k(blocks: _Blocks) -> _Parts:
    """16 bytes of a scale (low nibble) and a minimum for 16 elements, 64 bytes of pairs, fp16 scales of both."""
    scales, minimums = blocks[..., :16] & 15, blocks[..., :16] >> 4
    return _Parts(
        _pairs(blocks[..., 16:80]),
        _half(blocks, 80).astype(np.float32) * scales.astype(np.float32),
        -(_half(blocks, 82).astype(np.float32) * minimums.astype(np.float32)),
    )


def _q3_k(blocks: _Blocks) -> _Parts:
    """32 bytes of third bits, 64 of pairs, 12 of signed scales of 16 elements (6 bits each), and their fp16 scale.

    Bit i of the j-th of the 32 bytes is the third of element j of the i-th 32. The 8 bytes of nibbles of scales hold
    0 to 7 in their low ones and 8 to 15 in their high ones; the 4 bytes of pairs above them hold four runs of 4.
    """
    third = (blocks[..., :32][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _pairs(blocks[..., 32:96]) | third.astype(np.uint8).reshape(*blocks.shape[:-1], 256) << np.uint8(2)
    low = _nibbles(blocks[..., 96:104])
    high = np.concatenate([(blocks[..., 104:108] >> np.uint8(shift)) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    scales = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)
    return _Parts(codes, _half(blocks, 108).astype(np.float32) * scales)


def _pairs(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each 32 bytes hold 128 elements: those of the lowest two bits first."""
    by_half = packed.reshape(*packed.shape[:-1], 2, 32)
    codes = np.concatenate([(by_half >> np.uint8(shift)) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return codes.reshape(*packed.shape[:-1], 256)


def _q6_k(blocks: _Blocks) -> _Parts:
    """128 bytes of nibbles, 64 of pairs above them, 16 signed scales of 16 elements, and their fp16 scale.

    Each half of the 256 elements has its own 64 and 32 bytes. A product of the two scales is exact in fp32.
    """
    nibbles = blocks[..., :128].reshape(*blocks.shape[:-1], 2, 64)
    pairs = blocks[..., 128:192].reshape(*blocks.shape[:-1], 2, 32)
    low = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1)
    high = np.concatenate([(pairs >> np.uint8(shift)) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    codes = (low | (high << np.uint8(4))).reshape(*blocks.shape[:-1], 256)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    return _Parts(codes, _half(blocks, 208).astype(np.float32) * scales)


def _q4_k(blocks: _Blocks) -> _Parts:
    """fp16 scale of scales and of minimums, 12 bytes of these (6 bits each), 128 bytes of nibbles.

    Each 32 bytes hold 64 elements, those of low nibbles first. A product of the two scales is exact in fp32.
    """
    nibbles = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)
    codes = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1).reshape(*blocks.shape[:-1], 256)
    return _Parts(codes, *_six_bit_scales(blocks))


def _q5_k(blocks: _Blocks) -> _Parts:
    """As Q4_K, with 32 bytes before the nibbles: bit i of byte j is the fifth of element j of the i-th 32."""
    nibbles = blocks[..., 48:].reshape(*blocks.shape[:-1], 4, 32)
    low = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1).reshape(*blocks.shape[:-1], 8, 32)
    fifth = (blocks[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1).astype(np.uint8)
    codes = (low | (fifth << np.uint8(4))).reshape(*blocks.shape[:-1], 256)
    return _Parts(codes, *_six_bit_scales(blocks))


def _six_bit_scales(blocks: _Blocks) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and minimums of 8 groups: the first four of each are whole, the others' upper bits lie above them."""
    first, second, third = (blocks[..., start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate((first & 63, (third & 15) | ((first >> 6) << np.uint8(4))), axis=-1)
    minimums = np.concatenate((second & 63, (third >> 4) | ((second >> 6) << np.uint8(4))), axis=-1)
    return (
        _half(blocks, 0).astype(np.float32) * scales.astype(np.float32),
        -(_half(blocks, 2).astype(np.float32) * minimums.astype(np.float32)),
    )


def _with_fifth_bit(blocks: _Blocks, offset: int) -> NDArray[np.uint8]:
    fifth = np.unpackbits(blocks[..., offset : offset + 4], axis=-1, bitorder="little")
    codes: NDArray[np.uint8] = _nibbles(blocks[..., offset + 4 :]) | (fifth << np.uint8(4))
    return codes


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _half(blocks: _Blocks, offset: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view(_HALF)


_READERS: Mapping[GGMLQuantizationType, tuple[CodeForm, Callable[[_Blocks], _Parts]]] = {
    GGMLQuantizationType.Q8_0: (CodeForm(8, 32, _HALF), _q8_0),
    GGMLQuantizationType.Q4_0: (CodeForm(4, 32, _HALF), _q4_0),
    GGMLQuantizationType.Q4_1: (CodeForm(4, 32, _HALF, has_offsets=True), _q4_1),
    GGMLQuantizationType.Q5_0: (CodeForm(5, 32, _HALF), _q5_0),
    GGMLQuantizationType.Q5_1: (CodeForm(5, 32, _HALF, has_offsets=True), _q5_1),
    GGMLQuantizationType.Q2_K: (CodeForm(2, 16, _FLOAT, has_offsets=True), _q2_k),
    GGMLQuantizationType.Q3_K: (CodeForm(3, 16, _FLOAT), _q3_k),
    GGMLQuantizationType.Q4_K: (CodeForm(4, 32, _FLOAT, has_offsets=True), _q4_k),
    GGMLQuantizationType.Q5_K: (CodeForm(5, 32, _FLOAT, has_offsets=True), _q5_k),
    GGMLQuantizationType.Q6_K: (CodeForm(6, 16, _FLOAT), _q6_k),
}


QUANTIZED = tuple(_READERS)  # types


def encoding_of(kind: GGMLQuantizationType) -> Encoding:
    """How tensors of a quantized type are stored."""
    return Encoding(f"gguf-{kind.name.lower()}", _READERS[kind][0])


def decode(coded: NDArray[np.uint8], kind: GGMLQuantizationType) -> EncodedRows:
    """Stored rows [r, bytes] of a quantized type -> their codes and scales, no bit of which is changed.

    A minimum becomes an offset, exactly: fp16 numbers, and products of one with 6 bits, span less than float64 has.
    """
    form, read = _READERS[kind]
    _, block_bytes = GGML_QUANT_SIZES[kind]
    rows = len(coded)
    parts = read(coded.reshape(rows, -1, block_bytes))
    offsets = None
    if parts.minimums is not None:
        offsets = form.middle * parts.scales.astype(np.float64) + parts.minimums.astype(np.float64)
        offsets = offsets.reshape(rows, -1)
    return EncodedRows(form, parts.codes.reshape(rows, -1), parts.scales.reshape(rows, -1), offsets=offsets)
