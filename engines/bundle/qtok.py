"""The layout of tokenizer.qtok, for those who write and read it: docs/compiled-text.md says what each field means."""

from __future__ import annotations

import enum
import struct

import numpy as np
import numpy.typing as npt

__all__ = [
    "ADDED_ROW",
    "EMPTY",
    "HEADER",
    "IS_SPECIAL",
    "MAGIC",
    "MAX_ADDED",
    "MAX_PIECE",
    "MAX_PROBES",
    "NFC",
    "NO_PARENT",
    "SECTION",
    "SECTION_ALIGNMENT",
    "VERSION",
    "CharacterClass",
    "Section",
    "Splitter",
    "first_slots",
]

Ids = npt.NDArray[np.uint64]

MAGIC = b"QWENQTOK"
VERSION = 1
# Magic, version, CRC-32 of all from byte 16 on, bytes of the file, splitter, flags, ids, probes, sections.
HEADER = struct.Struct("<8sIIQIIIII20x")
SECTION = struct.Struct("<QQ")  # offset in the file, bytes
SECTION_ALIGNMENT = 64

NFC = 1  # in the flags of the header: text is composed before it is split

EMPTY = 0xFFFFFFFF  # a byte without a token; the left id of a slot without a merge
MAX_PROBES = 64  # a find that takes as many slots is refused
MAX_ADDED = 256  # bytes of an added token's text
MAX_PIECE = 4096  # bytes that an id stands for

ADDED_ROW = struct.Struct("<IIIII")  # id, flags, offset and bytes of its text, the longest other that begins it
IS_SPECIAL = 1
NO_PARENT = 0xFFFFFFFF


class Splitter(enum.IntEnum):
    """How text is cut into words."""

    QWEN2 = 1
    DIGITS_GPT2 = 2
    GPT2 = 3


class Section(enum.IntEnum):
    """The sections in the order of the file."""

    BYTE_IDS = 0
    MERGES = 1
    PIECE_OFFSETS = 2
    PIECES = 3
    CLASS_INDEX = 4
    CLASS_PAGES = 5
    ADDED = 6
    ADDED_NORMALIZED = 7
    ADDED_TEXTS = 8
    DECOMPOSITIONS = 9
    DECOMPOSED = 10
    COMBINING = 11
    COMPOSITIONS = 12


class CharacterClass(enum.IntFlag):
    """What a character is to the reference tokenizer."""

    LETTER = 1
    NUMBER = 2
    SPACE = 4
    DIGIT = 8  # cut apart by `Digits`
    NORMALIZED = 16  # may be changed by NFC, or change what stands before it


def first_slots(left: Ids, right: Ids, slots: int) -> Ids:
    """Where merges are looked for first.

    Args:
        left: an id each.
        right: the id behind it.
        slots: of the table, a power of two, at least 2.

    Source: multiplicative hashing by the golden ratio (Knuth, The Art of Computer Programming 3, 6.4).
    """
    products = (left << np.uint64(32) | right) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
    first: Ids = products >> np.uint64(65 - slots.bit_length())
    return first
