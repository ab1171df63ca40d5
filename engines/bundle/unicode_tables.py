"""What the reference tokenizer's library knows of Unicode, found by asking it: classes, and how NFC composes.

Its regular expressions, its normalizer and Python's `unicodedata` each are of a version of Unicode of their own, so
none of them can stand for another: 95 characters that Python 3.11 orders as combining marks are plain characters to the
normalizer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, normalizers, pre_tokenizers

from qwen_aot.errors import BuildError

__all__ = ["CODE_POINTS", "Normalization", "find_normalization", "letters", "numbers", "spaces", "split_digits"]

Codes = npt.NDArray[np.uint32]

CODE_POINTS = 0x110000

# Combining marks of the lowest class in use and of the highest (1 and 240): a mark of any other changes places with one
# of them. Classes never change from one version of Unicode to the next.
_LOWEST, _HIGHEST = 0x0334, 0x0345

# Syllables and their parts, which are composed by arithmetic (The Unicode Standard, 3.12).
_SYLLABLES = range(0xAC00, 0xD7A4)
_VOWELS, _TAILS = range(0x1161, 0x1176), range(0x11A8, 0x11C3)

# Planes 0 to 3 and the part of plane 14 that has characters. The rest is for private use, or nothing was ever put
# there; a test asks for all of it.
_ASKED: Codes = np.concatenate(
    [np.arange(start, stop, dtype=np.uint32) for start, stop in ((0, 0xD800), (0xE000, 0x40000), (0xE0000, 0xE1000))]
)
_SEPARATOR = ord("\n")  # in no composition, and in no class of marks


@dataclass(frozen=True, slots=True)
class Normalization:
    """Canonical composition as a library has it. Syllables of Hangul are composed by arithmetic and not listed.

    Attributes:
        decompositions: character -> what it is made of, to the end, in canonical order.
        orders: combining mark -> its class, counted from 1: marks are sorted by these.
        compositions: pair of characters -> the one that they compose to.
        touched: characters that NFC changes, or that it may join to or move before the one in front of them.
    """

    decompositions: dict[int, tuple[int, ...]]
    orders: dict[int, int]
    compositions: dict[tuple[int, int], int]
    touched: frozenset[int]


@functools.cache
def letters() -> Codes:
    r"""Characters of `\p{L}`."""
    return _matched(r"\p{L}+")


@functools.cache
def numbers() -> Codes:
    r"""Characters of `\p{N}`."""
    return _matched(r"\p{N}+")


@functools.cache
def spaces() -> Codes:
    r"""Characters of `\s`."""
    return _matched(r"\s+")


@functools.cache
def split_digits() -> Codes:
    """Characters that the pre-tokenizer `Digits` cuts apart."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    alone = [piece for piece, _ in digits.pre_tokenize_str(_text(_ASKED)) if len(piece) == 1]
    # A character that stands between two of them is alone too, but stays with the spaces put beside it here.
    found = {piece for piece, _ in digits.pre_tokenize_str(" ".join(alone)) if len(piece) == 1}
    return np.array(sorted(map(ord, found - {" "})), np.uint32)


@functools.cache
def find_normalization() -> Normalization:
    """What `normalizers.NFC` does.

    Raises:
        BuildError: it isn't made of decompositions, orders and compositions as Unicode has them.
    """
    codes = _ASKED[_ASKED != _SEPARATOR]
    decomposed = dict(zip(codes.tolist(), _separately(normalizers.NFD(), codes), strict=True))
    composed = dict(zip(codes.tolist(), _separately(normalizers.NFC(), codes), strict=True))
    decompositions = {code: tuple(map(ord, text)) for code, text in decomposed.items() if text != chr(code)}
    for code in _SYLLABLES:
        if decompositions.pop(code, None) != _syllable_parts(code) or composed[code] != chr(code):
            raise BuildError(
                f"this version of `tokenizers` doesn't compose the syllable U+{code:04X} by Unicode's rule"
            )
    orders = _orders([code for code in codes.tolist() if decomposed[code] == chr(code)])
    compositions = _compositions(
        {code: parts for code, parts in decompositions.items() if composed[code] == chr(code) and len(parts) > 1}
    )
    changed = {code for code, text in composed.items() if text != chr(code)}
    seconds = {second for _, second in compositions}
    joining = {*orders, *seconds, *_VOWELS, *_TAILS}
    heads = {code for code, parts in decompositions.items() if parts[0] in joining}
    return Normalization(decompositions, orders, compositions, frozenset({*changed, *joining, *heads}))


def _matched(pattern: str) -> Codes:
    """Characters that a pattern of one class matches."""
    left = _codes(normalizers.Replace(Regex(pattern), "").normalize_str(_text(_ASKED)))
    found: Codes = np.setdiff1d(_ASKED, left, assume_unique=True)
    return found


def _orders(codes: Sequence[int]) -> dict[int, int]:
    """Combining marks and their order, of characters that don't decompose: sorting is how the library tells them."""
    nfd = normalizers.NFD()
    asked = np.array(codes, np.uint32)
    after = _separately(nfd, asked, after=(_LOWEST,))
    before = _separately(nfd, asked, before=(_HIGHEST,))
    marks = [
        code
        for code, low, high in zip(codes, after, before, strict=True)
        if low != chr(code) + chr(_LOWEST) or high != chr(_HIGHEST) + chr(code)
    ]
    in_order = nfd.normalize_str("".join(map(chr, marks)))
    swapped = nfd.normalize_str("\n".join(second + first for first, second in itertools.pairwise(in_order))).split("\n")
    orders, order = {}, 1
    if in_order:
        orders[ord(in_order[0])] = order
    for (first, second), text in zip(itertools.pairwise(in_order), swapped, strict=False):
        order += text == first + second
        orders[ord(second)] = order
    if sorted(orders) != sorted(marks) or order > 255:
        raise BuildError("this version of `tokenizers` doesn't sort combining marks by Unicode's rule")
    return orders


def _compositions(decompositions: dict[int, tuple[int, ...]]) -> dict[tuple[int, int], int]:
    """Pairs that compose: the last part of a character, and the character that the parts before it make."""
    nfc = normalizers.NFC()
    heads = _normalized(nfc, [parts[:-1] for parts in decompositions.values()])
    pairs = {}
    for (code, parts), head in zip(decompositions.items(), heads, strict=True):
        if len(head) != 1:
            raise BuildError(f"this version of `tokenizers` composes U+{code:04X} of more than two characters")
        pairs[ord(head), parts[-1]] = code
    if _normalized(nfc, pairs) != list(map(chr, pairs.values())):
        raise BuildError("this version of `tokenizers` doesn't compose characters pair by pair")
    return pairs


def _normalized(normalizer: normalizers.Normalizer, texts: Iterable[Sequence[int]]) -> list[str]:
    return normalizer.normalize_str("\n".join("".join(map(chr, text)) for text in texts)).split("\n")


def _separately(
    normalizer: normalizers.Normalizer, codes: Codes, *, before: Sequence[int] = (), after: Sequence[int] = ()
) -> list[str]:
    """What becomes of each character, with others before and behind it."""
    columns = [np.full(len(codes), other, np.uint32) for other in (*before, *after, _SEPARATOR)]
    columns.insert(len(before), codes)
    texts = normalizer.normalize_str(_text(np.stack(columns, axis=1).ravel()[:-1])).split(chr(_SEPARATOR))
    if len(texts) != len(codes):
        raise BuildError("this version of `tokenizers` joins what stands on two lines")
    return texts


def _syllable_parts(code: int) -> tuple[int, ...]:
    index = code - _SYLLABLES.start
    tail = index % 28
    return (0x1100 + index // 588, 0x1161 + index % 588 // 28, *((0x11A7 + tail,) if tail else ()))


def _text(codes: Codes) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le")


def _codes(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint32)
