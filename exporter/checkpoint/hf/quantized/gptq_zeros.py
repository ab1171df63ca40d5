"""Zero points of GPTQ: which of its conventions a file's words are in, as far as that can be told.

Format v1 stores each zero less 1, v2 the zero. A v1 zero of 0 has three incompatible encodings:

- wrapped in its field: 15 (or 255), the fields beside it untouched;
- subtracted from the word as a whole, so that it takes 1 from the field above it (GPTQModel's
  `convert_gptq_v2_to_v1_format_module`, and AutoRound's sum of shifted fields);
- AutoGPTQ 0.7.1's and older packers (`zeros.astype(np.uint32)`, then `|=`): all bits of the fields above are set, and
  what they held is lost.

All three give the same word, which adding 1 to each field of the word undoes, unless a field below the highest is full.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.quantized.gptq_config import GptqSettings
from qwen_aot.exporter.checkpoint.hf.quantized.linear import StoredLinear
from qwen_aot.exporter.checkpoint.hf.quantized.words import WORD_BITS, Words, repeated, unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredZeros:
    """A linear's qzeros [G, N * bits / 32] and what it takes to read them."""

    linear: StoredLinear
    bits: int

    @property
    def words(self) -> Words:
        """The tensor, mapped."""
        words: Words = self.linear.array("qzeros").view(np.uint32)
        return words

    @property
    def is_middle_v1(self) -> bool:
        """Whether all zeros are the middle of the range, as v1 stores it."""
        return bool((self.words == repeated((1 << (self.bits - 1)) - 1, self.bits)).all())

    @property
    def is_middle_v2(self) -> bool:
        """Whether all zeros are the middle of the range, as v2 stores it."""
        return bool((self.words == repeated(1 << (self.bits - 1), self.bits)).all())

    def error(self, what: str) -> CheckpointError:
        """An error about these zeros."""
        return self.linear.error("qzeros", what)


def check_zeros(zeros: Sequence[StoredZeros], settings: GptqSettings) -> None:
    """Makes sure that the zeros mean one thing.

    Raises:
        CheckpointError: a symmetric checkpoint's aren't the middle throughout, or a v1 word can be read in several
            ways.
    """
    if settings.is_symmetric:
        _check_symmetric(zeros, settings)
    elif not settings.is_v2 and not settings.borrows:
        for each in zeros:
            _refuse_ambiguous(each)


def decode(words: Words, bits: int, *, is_v2: bool) -> NDArray[np.uint8]:
    """Zero points of words [..., n], whose fields lie along the last axis."""
    return unpack(words if is_v2 else words + repeated(1, bits), bits)


def _check_symmetric(zeros: Sequence[StoredZeros], settings: GptqSettings) -> None:
    """Whatever the configuration says of the format: files exist that say v1 and store v2."""
    first: dict[str, StoredZeros] = {}
    for each in zeros:
        found = "v1" if each.is_middle_v1 else "v2" if each.is_middle_v2 else None
        middle = 1 << (each.bits - 1)
        if found is None:
            raise each.error(
                f"has zeros other than {middle}, both as gptq (v1) and as gptq_v2, and sym is true or missing; "
                f"accepted: {middle} throughout, or sym: false"
            )
        first.setdefault(found, each)
    if len(first) > 1:
        raise first["v2"].error(
            f"stores zeros as gptq_v2, and {first['v1'].linear.name}.qzeros as gptq (v1); accepted: one format "
            "throughout"
        )
    declared = "v2" if settings.is_v2 else "v1"
    if first and declared not in first:
        logger.info("zeros are stored as GPTQ format %s, although the configuration says %s", *first, declared)


def _refuse_ambiguous(zeros: StoredZeros) -> None:
    is_full = zeros.words & _all_but_highest(zeros.bits)  # a field's lowest bit, set where all its bits are
    for shift in range(1, zeros.bits):
        is_full &= zeros.words >> np.uint32(shift)
    if is_full.any():
        group, word = np.argwhere(is_full)[0]
        field = (int(is_full[group, word]) & -int(is_full[group, word])).bit_length() // zeros.bits
        column = int(word) * (WORD_BITS // zeros.bits) + field
        raise zeros.error(
            f"has a zero point of 0 as gptq (v1) at group {group}, column {column}: tools store those in incompatible "
            "ways, and the configuration doesn't name one whose way is known (meta.quantizer); accepted: zeros from 1, "
            "a checkpoint of GPTQModel, or the zeros as they are with checkpoint_format: gptq_v2"
        )


def _all_but_highest(bits: int) -> np.uint32:
    """The lowest bit of each field of a word but the highest field."""
    mask: np.uint32 = repeated(1, bits) & np.uint32((1 << (WORD_BITS - bits)) - 1)
    return mask
