"""Compiles tokenizer.json into tokenizer.qtok, which the C library maps: docs/compiled-text.md states the format.

What is taken is byte-level BPE as Qwen, GPT-2 and SmolLM2 have it. A tokenizer of any other shape is refused by name;
one that is taken is proven against the `tokenizers` library before it is given out.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle import qtok_proof, unicode_tables
from qwen_aot.engines.bundle.qtok import (
    ADDED_ROW,
    EMPTY,
    HEADER,
    IS_SPECIAL,
    MAGIC,
    MAX_ADDED,
    MAX_PIECE,
    MAX_PROBES,
    NFC,
    NO_PARENT,
    SECTION,
    SECTION_ALIGNMENT,
    VERSION,
    CharacterClass,
    Section,
    Splitter,
    first_slots,
)
from qwen_aot.errors import BuildError
from qwen_aot.runtime.text.detokenizer import byte_of_character

__all__ = ["COMPILED_TOKENIZER_NAME", "TokenizerNotCompiledError", "compile_tokenizer"]

COMPILED_TOKENIZER_NAME = "tokenizer.qtok"

# The pattern of Qwen1.5, Qwen2, Qwen2.5 and Qwen3: contractions, words, single digits, symbols, line ends, spaces.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizers that are taken, but for `trim_offsets`, which no id depends on.
_PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_GPT2 = _PLAIN | {"use_regex": True}
_SPLITTERS: tuple[tuple[list[dict[str, Any]], Splitter], ...] = (
    (
        [
            {"type": "Split", "pattern": {"Regex": _QWEN2_PATTERN}, "behavior": "Isolated", "invert": False},
            _PLAIN,
        ],
        Splitter.QWEN2,
    ),
    ([{"type": "Digits", "individual_digits": True}, _GPT2], Splitter.DIGITS_GPT2),
    ([_GPT2], Splitter.GPT2),
)


class TokenizerNotCompiledError(BuildError):
    """A tokenizer of a shape that isn't compiled; the bundle works without, in Python."""


def compile_tokenizer(tokenizer_json: str, *, vocab_size: int) -> bytes:
    """The content of tokenizer.qtok.

    Args:
        tokenizer_json: as the `tokenizers` library reads it.
        vocab_size: of the model.

    Raises:
        TokenizerNotCompiledError: it is of another shape, or the result doesn't give the ids that the library gives.
    """
    tokenizer = RustTokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    document = json.loads(tokenizer.to_str())  # as the library understands it: every field, one spelling of each
    splitter = _splitter(document["pre_tokenizer"])
    _check_shape(document)
    vocab: dict[str, int] = document["model"]["vocab"]
    added = _added_tokens(tokenizer, has_normalizer=document["normalizer"] is not None)
    largest = max([*vocab.values(), *(token.id for token in added)], default=-1)
    if largest >= vocab_size:
        raise TokenizerNotCompiledError(f"its largest id is {largest}, and the model's vocabulary has {vocab_size}")
    _check_ids(vocab, added)
    byte_ids = _byte_ids(vocab, document["model"])
    merges = _merges(vocab, document["model"]["merges"])
    _check_plain_text(added, {result for _, result in merges.values()}.union(byte_ids))
    table = _write(
        splitter=splitter,
        is_nfc=document["normalizer"] is not None,
        byte_ids=byte_ids,
        merges=merges,
        pieces=_pieces(vocab, added, largest + 1),
        added=added,
    )
    if difference := qtok_proof.find_difference(table, tokenizer):
        raise TokenizerNotCompiledError(f"its compiled form isn't the same: {difference}")
    return table


@dataclass(frozen=True, slots=True)
class _Added:
    """An added token.

    Attributes:
        id: as the library has it.
        content: as it is looked for.
        is_special: it has no text.
        is_normalized: it is looked for in normalized text, after those that aren't.
    """

    id: int
    content: str
    is_special: bool
    is_normalized: bool


def _splitter(pre_tokenizer: Mapping[str, Any] | None) -> Splitter:
    parts: list[Mapping[str, Any]] = []
    if pre_tokenizer is not None:
        is_sequence = pre_tokenizer["type"] == "Sequence"
        parts = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    shape = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
    for taken, splitter in _SPLITTERS:
        if shape == taken:
            return splitter
    raise TokenizerNotCompiledError(
        f"its pre-tokenizer is {_shown(shape)}; compiled are Qwen2's split and ByteLevel, Digits and ByteLevel with "
        "its own split, and the latter alone"
    )


def _check_shape(document: Mapping[str, Any]) -> None:
    """Refuses what the reader has no rule for.

    Raises:
        TokenizerNotCompiledError: it names the part.
    """

    def refuse(part: str, value: Any, accepted: str) -> None:
        raise TokenizerNotCompiledError(f"its {part} is {_shown(value)}; compiled is {accepted}")

    model = document["model"]
    if model["type"] != "BPE":
        refuse("model", model["type"], "BPE over bytes")
    if document["normalizer"] not in (None, {"type": "NFC"}):
        refuse("normalizer", document["normalizer"], "NFC, or none")
    for part in ("post_processor", "decoder"):
        value = document[part]
        if value is not None and value["type"] == "ByteLevel":
            continue
        if part == "decoder":
            refuse(part, value, "ByteLevel")
        if value is not None:
            refuse(part, value, "ByteLevel, or none: nothing is put around a text")
    for flag in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[flag] not in (None, ""):
            refuse(flag, model[flag], "none")
    if model["ignore_merges"]:
        refuse("ignore_merges", True, "false: a word becomes tokens by its merges")


def _added_tokens(tokenizer: RustTokenizer, *, has_normalizer: bool) -> list[_Added]:
    """The added tokens, in the order of their ids."""
    found = []
    for id_, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        for flag in ("lstrip", "rstrip", "single_word"):
            if getattr(token, flag):
                raise TokenizerNotCompiledError(
                    f"its added token {token.content!r} has {flag}; compiled is none that has"
                )
        if not token.content:
            raise TokenizerNotCompiledError(f"its added token {id_} has no text")
        if len(token.content.encode()) > MAX_ADDED:
            raise TokenizerNotCompiledError(
                f"its added token {id_} has {len(token.content.encode())} bytes; compiled is one of at most {MAX_ADDED}"
            )
        if token.normalized and has_normalizer:
            normalized = tokenizer.normalizer.normalize_str(token.content)
            if normalized != token.content:
                raise TokenizerNotCompiledError(
                    f"its added token {token.content!r} is looked for as {normalized!r}; compiled is one in normal form"
                )
        found.append(_Added(id_, token.content, token.special, token.normalized))
    return found


def _check_ids(vocab: Mapping[str, int], added: Sequence[_Added]) -> None:
    """Refuses an id that two tokens have: a library that numbers added tokens by counting gives one out twice."""
    tokens: dict[int, str] = {}
    for token, id_ in [*vocab.items(), *((token.content, token.id) for token in added)]:
        if tokens.setdefault(id_, token) != token:
            raise TokenizerNotCompiledError(f"its tokens {tokens[id_]!r} and {token!r} have the same id {id_}")


def _byte_ids(vocab: Mapping[str, int], model: Mapping[str, Any]) -> list[int]:
    """The id of each byte; EMPTY where the vocabulary lacks it: the library leaves such a byte out."""
    ids = [EMPTY] * 256
    for character, byte in byte_of_character().items():
        ids[byte] = vocab.get(character, EMPTY)
    if EMPTY in ids:
        for flag in ("unk_token", "byte_fallback"):
            if model[flag]:
                raise TokenizerNotCompiledError(
                    f"its vocabulary lacks {ids.count(EMPTY)} bytes and it has {flag} {_shown(model[flag])}; compiled "
                    "is one without, which leaves these bytes out"
                )
    return ids


def _merges(vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Pair of ids -> rank and the id that it becomes; of a pair that stands twice, the last counts."""
    return {(vocab[left], vocab[right]): (rank, vocab[left + right]) for rank, (left, right) in enumerate(merges)}


def _check_plain_text(added: Sequence[_Added], made: Set[int]) -> None:
    """Refuses an added token that plain text can become: it couldn't be told from one that stands for itself."""
    for token in added:
        if token.id in made:
            raise TokenizerNotCompiledError(
                f"its added token {token.content!r} is also what bytes and merges make of plain text"
            )


def _pieces(vocab: Mapping[str, int], added: Sequence[_Added], count: int) -> list[bytes]:
    """The bytes of each id, as a detokenizer gives them; none where there is no token."""
    pieces = [b""] * count
    alphabet = byte_of_character()
    for token, id_ in [*vocab.items(), *((token.content, token.id) for token in added)]:
        try:
            pieces[id_] = bytes([alphabet[character] for character in token])
        except KeyError:  # an added token is spelled in plain text
            pieces[id_] = token.encode()
        if len(pieces[id_]) > MAX_PIECE:
            raise TokenizerNotCompiledError(
                f"its token {id_} stands for {len(pieces[id_])} bytes; compiled is one of at most {MAX_PIECE}"
            )
    return pieces


def _write(
    *,
    splitter: Splitter,
    is_nfc: bool,
    byte_ids: Sequence[int],
    merges: Mapping[tuple[int, int], tuple[int, int]],
    pieces: Sequence[bytes],
    added: Sequence[_Added],
) -> bytes:
    slots, probes = _hash_table(merges)
    normalization = unicode_tables.find_normalization() if is_nfc else None
    index, pages = _class_pages(_classes(splitter, normalization))
    raw, normalized, contents = _added_rows(added)
    sections: dict[Section, bytes] = {
        Section.BYTE_IDS: _u32(byte_ids),
        Section.MERGES: slots.astype("<u4").tobytes(),
        Section.PIECE_OFFSETS: _u32(np.concatenate([[0], np.cumsum([len(piece) for piece in pieces], dtype=np.int64)])),
        Section.PIECES: b"".join(pieces),
        Section.CLASS_INDEX: index,
        Section.CLASS_PAGES: pages,
        Section.ADDED: raw,
        Section.ADDED_NORMALIZED: normalized,
        Section.ADDED_TEXTS: contents,
        **_normalization_sections(normalization),
    }
    offset = -(-(HEADER.size + SECTION.size * len(Section)) // SECTION_ALIGNMENT) * SECTION_ALIGNMENT
    directory, body = b"", b""
    for section in Section:
        body += bytes(-len(body) % SECTION_ALIGNMENT)
        directory += SECTION.pack(offset + len(body), len(sections[section]))
        body += sections[section]
    fields = (offset + len(body), splitter, NFC if is_nfc else 0, len(pieces), probes, len(Section))
    unsigned = HEADER.pack(MAGIC, VERSION, 0, *fields) + directory
    unsigned += bytes(offset - len(unsigned)) + body
    checksum = zlib.crc32(memoryview(unsigned)[16:])
    return HEADER.pack(MAGIC, VERSION, checksum, *fields) + unsigned[HEADER.size :]


def _hash_table(merges: Mapping[tuple[int, int], tuple[int, int]]) -> tuple[npt.NDArray[np.uint32], int]:
    """Open addressing with linear probing: slots of [left, right, rank, result], and the most that a find looks at."""
    rows = np.array([(*pair, *found) for pair, found in merges.items()], np.uint64).reshape(-1, 4)
    count = 16
    while count < len(rows) * 1.5:
        count *= 2
    while True:
        taken = bytearray(count)
        places = []
        probes = 1
        for first in first_slots(rows[:, 0], rows[:, 1], count).tolist():  # the most frequent are found soonest
            slot = first
            while taken[slot]:
                slot = (slot + 1) % count
            taken[slot] = 1
            places.append(slot)
            probes = max(probes, (slot - first) % count + 1)
        if probes < MAX_PROBES:
            break
        count *= 2
    slots = np.full((count, 4), EMPTY, np.uint32)
    slots[places] = rows.astype(np.uint32)
    return slots, probes + 1  # and one that finds the end


def _classes(splitter: Splitter, normalization: unicode_tables.Normalization | None) -> npt.NDArray[np.uint8]:
    classes = np.zeros(unicode_tables.CODE_POINTS, np.uint8)
    classes[unicode_tables.letters()] |= int(CharacterClass.LETTER)
    classes[unicode_tables.numbers()] |= int(CharacterClass.NUMBER)
    classes[unicode_tables.spaces()] |= int(CharacterClass.SPACE)
    if splitter is Splitter.DIGITS_GPT2:
        classes[unicode_tables.split_digits()] |= int(CharacterClass.DIGIT)
    if normalization is not None:
        classes[sorted(normalization.touched)] |= int(CharacterClass.NORMALIZED)
    return classes


def _class_pages(classes: npt.NDArray[np.uint8]) -> tuple[bytes, bytes]:
    """Pages of 256 characters, each once, and the page of each 256."""
    pages: dict[bytes, int] = {}
    index = bytes(pages.setdefault(row.tobytes(), len(pages)) for row in classes.reshape(-1, 256))
    return index, b"".join(pages)


def _added_rows(added: Sequence[_Added]) -> tuple[bytes, bytes, bytes]:
    """Rows of those looked for as they stand, of those looked for in normalized text, and the texts of both."""
    texts = b""
    tables = []
    for is_normalized in (False, True):
        tokens = sorted((token.content.encode(), token) for token in added if token.is_normalized is is_normalized)
        rows, open_ = b"", list[int]()  # tokens that begin this one, the longest last
        for n, (text, token) in enumerate(tokens):
            while open_ and not text.startswith(tokens[open_[-1]][0]):
                open_.pop()
            flags = IS_SPECIAL * token.is_special
            rows += ADDED_ROW.pack(token.id, flags, len(texts), len(text), open_[-1] if open_ else NO_PARENT)
            texts += text
            open_.append(n)
        tables.append(rows)
    return tables[0], tables[1], texts


def _normalization_sections(normalization: unicode_tables.Normalization | None) -> dict[Section, bytes]:
    rows: list[tuple[int, int, int]] = []
    parts: list[int] = []
    if normalization is None:
        normalization = unicode_tables.Normalization({}, {}, {}, frozenset())
    for code, decomposition in sorted(normalization.decompositions.items()):
        rows.append((code, len(parts), len(decomposition)))
        parts += decomposition
    return {
        Section.DECOMPOSITIONS: _u32(rows),
        Section.DECOMPOSED: _u32(parts),
        Section.COMBINING: _u32(sorted(normalization.orders.items())),
        Section.COMPOSITIONS: _u32([(*pair, code) for pair, code in sorted(normalization.compositions.items())]),
    }


def _u32(values: Any) -> bytes:
    return np.asarray(values, np.int64).astype("<u4").tobytes()


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."
