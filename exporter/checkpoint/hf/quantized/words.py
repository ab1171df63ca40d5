"""Fields of 4 or 8 bits in 32-bit words: what every format here packs its codes in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32
Words = NDArray[np.uint32]


def unpack(words: Words, bits: int) -> NDArray[np.uint8]:
    """[..., n] words -> [..., n * 32 / bits] fields along the last axis, a word's low bits first."""
    packed = np.ascontiguousarray(words, "<u4").view(np.uint8)
    if bits == 8:
        return packed
    assert bits == 4
    fields = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=fields[..., 0::2])
    np.right_shift(packed, 4, out=fields[..., 1::2])
    return fields


def repeated(field: int, bits: int) -> np.uint32:
    """A word whose fields are all this one."""
    word: np.uint32 = np.uint32(sum(field << shift for shift in range(0, WORD_BITS, bits)))
    return word


def words_of(start: int, stop: int, bits: int) -> slice:
    """The words that hold fields `start` to `stop`."""
    fields = WORD_BITS // bits
    return slice(start // fields, -(-stop // fields))


def fields_of(start: int, stop: int, bits: int) -> slice:
    """Where fields `start` to `stop` lie among those of `words_of`."""
    first = start // (WORD_BITS // bits) * (WORD_BITS // bits)
    return slice(start - first, stop - first)


def pack(fields: NDArray[np.uint8], bits: int) -> Words:
    """[..., n] fields -> [..., ceil(n * bits / 32)] words: what `unpack` undoes; fields that aren't there are 0."""
    assert bits in (4, 8)
    per_word, n = WORD_BITS // bits, fields.shape[-1]
    words = np.zeros((*fields.shape[:-1], -(-n // per_word)), "<u4")
    packed = words.view(np.uint8)
    if bits == 8:
        packed[..., :n] = fields
    else:
        packed[..., : (n + 1) // 2] = fields[..., 0::2]
        packed[..., : n // 2] |= fields[..., 1::2] << np.uint8(4)
    return words
