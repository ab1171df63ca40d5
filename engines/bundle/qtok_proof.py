"""Reads a tokenizer.qtok in Python and compares its ids with the reference tokenizer's, before a bundle is written.

It is written from docs/compiled-text.md, as the C reader is, and shares nothing with the compiler but the layout.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle.qtok import (
    ADDED_ROW,
    EMPTY,
    HEADER,
    IS_SPECIAL,
    NFC,
    SECTION,
    CharacterClass,
    Section,
    Splitter,
)
from qwen_aot.runtime.text.detokenizer import byte_of_character

__all__ = ["QtokReader", "find_difference", "library_words", "texts"]

_NUM_TEXTS = 1500

_LETTER, _NUMBER, _SPACE, _DIGIT = (
    int(CharacterClass.LETTER),
    int(CharacterClass.NUMBER),
    int(CharacterClass.SPACE),
    int(CharacterClass.DIGIT),
)
_WORD = _LETTER | _NUMBER
_CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d")


@dataclass(frozen=True, slots=True)
class _Added:
    id: int
    text: str
    is_special: bool


class QtokReader:
    """Encodes by a compiled tokenizer. For proofs: it checks nothing, and is slow."""

    def __init__(self, table: bytes) -> None:
        header = HEADER.unpack_from(table)
        sections = {}
        for section in Section:
            offset, size = SECTION.unpack_from(table, HEADER.size + SECTION.size * section)
            sections[section] = table[offset : offset + size]
        self._splitter = Splitter(header[4])
        self._is_nfc = bool(header[5] & NFC)
        self._byte_ids = _numbers(sections[Section.BYTE_IDS])
        slots = np.frombuffer(sections[Section.MERGES], "<u4").reshape(-1, 4)
        slots = slots[slots[:, 0] != EMPTY]
        pairs = zip(slots[:, 0].tolist(), slots[:, 1].tolist(), strict=True)
        self._merges = dict(zip(pairs, zip(slots[:, 2].tolist(), slots[:, 3].tolist(), strict=True), strict=True))
        self._index = sections[Section.CLASS_INDEX]
        self._pages = sections[Section.CLASS_PAGES]
        self._added = [
            [
                _Added(id_, sections[Section.ADDED_TEXTS][start : start + size].decode(), bool(flags & IS_SPECIAL))
                for id_, flags, start, size, _ in ADDED_ROW.iter_unpack(sections[section])
            ]
            for section in (Section.ADDED, Section.ADDED_NORMALIZED)
        ]
        parts = _numbers(sections[Section.DECOMPOSED])
        self._decompositions = {
            code: parts[start : start + count] for code, start, count in _rows(sections[Section.DECOMPOSITIONS], 3)
        }
        self._orders = {code: order for code, order in _rows(sections[Section.COMBINING], 2)}
        self._compositions = {(first, second): code for first, second, code in _rows(sections[Section.COMPOSITIONS], 3)}

    def encode(self, text: str, *, allow_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens that it spells are plain text where they aren't allowed."""
        ids: list[int] = []
        for found, raw in self._cut(text, 0, allow_special_tokens):
            if found is not None:
                ids.append(found)
                continue
            for inner, plain in self._cut(self._compose(raw), 1, allow_special_tokens):
                if inner is not None:
                    ids.append(inner)
                    continue
                for word in self._split(plain):
                    ids += self._merge(word.encode())
        return ids

    def words(self, text: str) -> list[str]:
        """The words of a text in normal form, added tokens not looked for."""
        return list(self._split(self._compose(text)))

    def _cut(self, text: str, which: int, allow_special_tokens: bool) -> Iterator[tuple[int | None, str]]:
        """Ids of added tokens, and the texts between them: leftmost first, of those at one place the longest."""
        tokens = [token for token in self._added[which] if allow_special_tokens or not token.is_special]
        start = 0
        while start < len(text):
            places = [
                (place, -len(token.text), token) for token in tokens if (place := text.find(token.text, start)) >= 0
            ]
            if not places:
                break
            place, _, token = min(places, key=lambda found: found[:2])
            if place > start:
                yield None, text[start:place]
            yield token.id, ""
            start = place + len(token.text)
        if start < len(text):
            yield None, text[start:]

    def _compose(self, text: str) -> str:
        """NFC of a whole text."""
        if not self._is_nfc or not any(self._class(character) & CharacterClass.NORMALIZED for character in text):
            return text
        codes: list[int] = []
        for code in map(ord, text):
            if 0xAC00 <= code < 0xD7A4:
                index = code - 0xAC00
                codes += [0x1100 + index // 588, 0x1161 + index % 588 // 28]
                codes += [0x11A7 + index % 28] if index % 28 else []
            else:
                codes += self._decompositions.get(code, (code,))
        start = 0
        while start < len(codes):
            end = start
            while end < len(codes) and codes[end] in self._orders:
                end += 1
            codes[start:end] = sorted(codes[start:end], key=self._orders.__getitem__)
            start = end + 1
        composed: list[int] = []
        starter, last = -1, 0
        for code in codes:
            order = self._orders.get(code, 0)
            if starter >= 0 and (last < order or starter == len(composed) - 1):
                joined = self._joined(composed[starter], code)
                if joined is not None:
                    composed[starter] = joined
                    continue
            if order == 0:
                starter = len(composed)
            last = order
            composed.append(code)
        return "".join(map(chr, composed))

    def _joined(self, first: int, second: int) -> int | None:
        if 0x1100 <= first < 0x1113 and 0x1161 <= second < 0x1176:
            return 0xAC00 + ((first - 0x1100) * 21 + second - 0x1161) * 28
        if 0xAC00 <= first < 0xD7A4 and (first - 0xAC00) % 28 == 0 and 0x11A7 < second < 0x11C3:
            return first + second - 0x11A7
        return self._compositions.get((first, second))

    def _split(self, text: str) -> Iterator[str]:
        classes = [self._class(character) for character in text]
        if self._splitter is Splitter.QWEN2:
            yield from self._split_qwen2(text, classes)
            return
        start = 0
        while start < len(text):
            end = start + 1
            if self._splitter is Splitter.DIGITS_GPT2 and classes[start] & _DIGIT:
                yield text[start:end]
            else:
                while end < len(text) and not (self._splitter is Splitter.DIGITS_GPT2 and classes[end] & _DIGIT):
                    end += 1
                yield from self._split_gpt2(text[start:end], classes[start:end])
            start = end

    def _split_qwen2(self, text: str, classes: Sequence[int]) -> Iterator[str]:
        start, size = 0, len(text)
        while start < size:
            end = start + _contraction(text, start, is_folded=True)
            if end == start:  # one character that is neither of a word nor a line end, and letters
                first = start + (text[start] not in "\r\n" and not classes[start] & _WORD)
                end = _run(classes, first, lambda of: bool(of & _LETTER))
                end = end if end > first else start
            if end == start and classes[start] & _NUMBER:
                end = start + 1
            if end == start:  # a space, and symbols with the line ends behind them
                first = start + (text[start] == " ")
                end = _run(classes, first, lambda of: not of & (_WORD | _SPACE))
                if end > first:
                    while end < size and text[end] in "\r\n":
                        end += 1
                else:
                    end = start
            if end == start:  # white space
                stop = _run(classes, start, lambda of: bool(of & _SPACE))
                lines = max(text.rfind("\n", start, stop), text.rfind("\r", start, stop)) + 1
                end = lines if lines > start else _before_word(start, stop, size)
            end = max(end, start + 1)  # classes of a wrong table may fit no rule
            yield text[start:end]
            start = end

    def _split_gpt2(self, text: str, classes: Sequence[int]) -> Iterator[str]:
        start, size = 0, len(text)
        kinds = [
            "space" if of & _SPACE else "letter" if of & _LETTER else "number" if of & _NUMBER else "symbol"
            for of in classes
        ]
        while start < size:
            end = start + _contraction(text, start, is_folded=False)
            if end == start:
                first = start + (text[start] == " " and start + 1 < size)
                if kinds[first] == "space":
                    end = start
                    while end < size and kinds[end] == "space":
                        end += 1
                    end = _before_word(start, end, size)
                else:
                    end = first
                    while end < size and kinds[end] == kinds[first]:
                        end += 1
            end = max(end, start + 1)  # classes of a wrong table may fit no rule
            yield text[start:end]
            start = end

    def _merge(self, word: bytes) -> list[int]:
        """Pairs become one by their ranks, the leftmost of one rank first; bytes without a token are left out."""
        ids = [self._byte_ids[byte] for byte in word if self._byte_ids[byte] != EMPTY]
        while len(ids) > 1:
            ranked = [
                (found[0], place, found[1])
                for place in range(len(ids) - 1)
                if (found := self._merges.get((ids[place], ids[place + 1]))) is not None
            ]
            if not ranked:
                break
            _, place, result = min(ranked)
            ids[place : place + 2] = [result]
        return ids

    def _class(self, character: str) -> int:
        code = ord(character)
        return self._pages[self._index[code >> 8] * 256 + (code & 255)]


def find_difference(table: bytes, tokenizer: RustTokenizer) -> str | None:
    """What of the first text isn't as the reference has it: its words, its ids; None: all is the same.

    Words are compared for themselves: a vocabulary with few merges gives the same ids however text is split.
    """
    reader = QtokReader(table)
    asked = texts(tokenizer, _NUM_TEXTS)
    for text, encoding in zip(asked, tokenizer.encode_batch(asked, add_special_tokens=False), strict=True):
        if (words := reader.words(text)) != (expected := library_words(tokenizer, text)):
            return f"{text!r} is split into {words}, and by the library into {expected}"
        if (ids := reader.encode(text)) != encoding.ids:
            return f"{text!r} is {ids}, and by the library {encoding.ids}"
    return None


def library_words(tokenizer: RustTokenizer, text: str) -> list[str]:
    """The words of a text as the library's normalizer and pre-tokenizer have them, added tokens not looked for."""
    normalized = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text
    alphabet = byte_of_character()
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]
    return [bytes([alphabet[character] for character in word]).decode() for word in words]


def texts(tokenizer: RustTokenizer, count: int) -> list[str]:
    """Texts that reach every rule: scripts and classes mixed, marks out of order, added tokens whole and cut."""
    rng = random.Random(1)
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()] or ["<|end|>"]
    size = tokenizer.get_vocab_size(with_added_tokens=False)

    def characters(*ranges: tuple[int, int]) -> str:
        start, stop = rng.choice(ranges)
        return chr(rng.randrange(start, stop))

    def cut() -> str:
        token = rng.choice(added)
        return token[: rng.randrange(len(token) + 1)]

    pools: list[Callable[[], str]] = [
        lambda: rng.choice("abcdeXYZ '"),
        lambda: rng.choice(" \t\n\r\v\f\u00a0\u3000\u2028\u0085\u200b\ufeff\x1c\x00"),
        lambda: rng.choice("0123456789²½٣Ⅷ一"),
        lambda: rng.choice(["'s", "'S", "'LL", "'ll", "'ſ", "'re", "'VE", "'ſſ", "'K"]),
        lambda: characters((0x20, 0x250)),
        lambda: characters((0x300, 0x370), (0x1DC0, 0x1E00), (0x20D0, 0x20F0)),
        lambda: characters((0x370, 0x3000)),
        lambda: characters((0x3040, 0x3100), (0x4E00, 0x9FFF)),
        lambda: characters((0xAC00, 0xD7A4), (0x1100, 0x1113), (0x1161, 0x1176), (0x11A8, 0x11C3)),
        lambda: characters(
            (0xE000, 0xF900),
            (0xF900, 0xFB10),
            (0x10000, 0x20000),
            (0x1F300, 0x1FA00),
            (0x2F800, 0x2FA20),
            (0xE000, 0x110000),
        ),
        lambda: rng.choice(added),
        cut,
        lambda: rng.choice("!?.,;:-_/\\()[]{}<>|@#$%^&*+=~`\"'"),
        lambda: tokenizer.decode([rng.randrange(size)], skip_special_tokens=False) if size else "",
    ]
    made = []
    for _ in range(count):
        chosen = rng.sample(pools, rng.randrange(1, 5))
        made.append("".join(rng.choice(chosen)() for _ in range(rng.randrange(1, 30))))
    return made


def _contraction(text: str, start: int, *, is_folded: bool) -> int:
    """How many characters from here on are 's, 't, 're, 've, 'm, 'll or 'd; folded: in capitals too."""
    if text[start] != "'":
        return 0
    rest = text[start + 1 : start + 3]
    if is_folded:
        rest = rest.translate({ord("ſ"): "s"} | {ord(letter): letter.lower() for letter in "STREVMLD"})
    return 1 + next((len(ending) for ending in _CONTRACTIONS if rest.startswith(ending)), -1)


def _run(classes: Sequence[int], start: int, holds: Callable[[int], bool]) -> int:
    while start < len(classes) and holds(classes[start]):
        start += 1
    return start


def _before_word(start: int, stop: int, size: int) -> int:
    """White space leaves its last character to the word behind it."""
    return stop - 1 if stop < size and stop - 1 > start else stop


def _numbers(section: bytes) -> list[int]:
    return list(map(int, np.frombuffer(section, "<u4").tolist()))


def _rows(section: bytes, width: int) -> list[list[int]]:
    rows: list[list[int]] = np.frombuffer(section, "<u4").reshape(-1, width).tolist()
    return rows
