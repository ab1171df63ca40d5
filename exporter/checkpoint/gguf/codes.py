"""GGUF's quantized types as codes: those whose values are (code - middle) * scale, with no minimum.

Source: the block structs of ggml (`ggml-common.h`); the gguf package's `quants` is what tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows, Encoding

_HALF = np.dtype("<f2")
_Blocks = NDArray[np.uint8]  # [r, blocks, bytes of a block]
_Parts = tuple[NDArray[np.uint8], NDArray[Any]]  # codes [r, blocks, elements], scales [r, blocks, groups]


def _q8_0(blocks: _Blocks) -> _Parts:
    """fp16 scale, 32 signed bytes: -128 becomes code 0."""
    return blocks[..., 2:] ^ np.uint8(0x80), _half(blocks, 0)


def _q4_0(blocks: _Blocks) -> _Parts:
    """fp16 scale, 16 bytes: low nibbles are elements 0 to 15, high ones 16 to 31."""
    return _nibbles(blocks[..., 2:]), _half(blocks, 0)


def _q5_0(blocks: _Blocks) -> _Parts:
    """fp16 scale, 4 bytes with the fifth bit of each element, nibbles as in Q4_0."""
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    return _nibbles(blocks[..., 6:]) | (fifth << np.uint8(4)), _half(blocks, 0)


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
    return codes, _half(blocks, 208).astype(np.float32) * scales


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _half(blocks: _Blocks, offset: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view(_HALF)


_READERS: Mapping[GGMLQuantizationType, tuple[CodeForm, Callable[[_Blocks], _Parts]]] = {
    GGMLQuantizationType.Q8_0: (CodeForm(8, 32, _HALF), _q8_0),
    GGMLQuantizationType.Q4_0: (CodeForm(4, 32, _HALF), _q4_0),
    GGMLQuantizationType.Q5_0: (CodeForm(5, 32, _HALF), _q5_0),
    GGMLQuantizationType.Q6_K: (CodeForm(6, 16, np.dtype(np.float32)), _q6_k),
}


def encoding_of(kind: GGMLQuantizationType) -> Encoding:
    """How tensors of a quantized type are stored; without a form if their values have minimums or nested ranges."""
    form = _READERS[kind][0] if kind in _READERS else None
    return Encoding(f"gguf-{kind.name.lower()}", form)


def has_codes(kind: GGMLQuantizationType) -> bool:
    """Whether `decode` reads the type."""
    return kind in _READERS


def decode(coded: NDArray[np.uint8], kind: GGMLQuantizationType) -> EncodedRows:
    """Stored rows [r, bytes] of a type that `has_codes` -> their codes and scales, no bit of which is changed."""
    form, read = _READERS[kind]
    _, block_bytes = GGML_QUANT_SIZES[kind]
    rows = len(coded)
    codes, scales = read(coded.reshape(rows, -1, block_bytes))
    return EncodedRows(form, codes.reshape(rows, -1), scales.reshape(rows, -1))
