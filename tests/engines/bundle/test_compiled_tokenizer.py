"""What is compiled gives the library's ids, what isn't is refused by name, and a wrong table is found in time."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle import compiled_tokenizer, qtok_proof
from qwen_aot.engines.bundle.compiled_tokenizer import TokenizerNotCompiledError, compile_tokenizer
from qwen_aot.engines.bundle.qtok import EMPTY, HEADER, MAGIC, SECTION, VERSION, Section, Splitter, first_slots
from qwen_aot.engines.bundle.qtok_proof import QtokReader, find_difference
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.bpe import byte_level_bpe
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.runtime.compiled_texts import (
    GOLDEN_NAMES,
    TOKENIZATION,
    VOCAB_SIZE,
    compiled,
    names,
    reference,
    tokenizer_json,
)


def section(table: bytes, which: Section) -> tuple[int, int]:
    """Where it begins and ends in the file."""
    offset, size = SECTION.unpack_from(table, HEADER.size + SECTION.size * which)
    return offset, offset + size


def numbers(table: bytes, which: Section) -> list[int]:
    start, stop = section(table, which)
    found: list[int] = np.frombuffer(table[start:stop], "<u4").tolist()
    return found


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name: str) -> None:
    reader = QtokReader(compiled(name))
    for case in TOKENIZATION["cases"]:
        if case["tokenizer"] == name:
            assert reader.encode(case["text"]) == case["ids"]
            assert reader.encode(case["text"], allow_special_tokens=False) == case["plain_ids"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text(text: str) -> None:
    for name in GOLDEN_NAMES:
        assert READERS[name].encode(text) == reference(name).encode(text, add_special_tokens=False).ids


READERS = {name: QtokReader(compiled(name)) for name in GOLDEN_NAMES}


@pytest.mark.parametrize("name", names())
def test_the_file(name: str) -> None:
    """Its header, its checksum, and that every section lies where it may."""
    table = compiled(name)
    magic, version, checksum, size, splitter, flags, ids, probes, sections = HEADER.unpack_from(table)
    assert (magic, version, checksum, size) == (MAGIC, VERSION, zlib.crc32(table[16:]), len(table))
    document = json.loads(reference(name).to_str())
    assert flags == (document["normalizer"] is not None)
    assert splitter == {"gpt2": 3, "qwen2": 1, "smollm2": 2, "many": 1, "real": 2}[name]
    assert ids == 1 + max(reference(name).get_vocab().values())
    assert sections == len(Section) == 13 and 2 <= probes <= 64
    end = HEADER.size + SECTION.size * sections
    for which in Section:
        start, stop = section(table, which)
        assert start % 64 == 0 and end <= start <= stop and not any(table[end:start])
        end = stop
    assert end == len(table)


@pytest.mark.parametrize("name", names())
def test_merges_are_found_where_they_are_looked_for(name: str) -> None:
    table = compiled(name)
    slots = np.array(numbers(table, Section.MERGES), np.uint64).reshape(-1, 4)
    taken = slots[:, 0] != EMPTY
    document = json.loads(reference(name).to_str())["model"]
    vocab = document["vocab"]
    found = {(left, right): (rank, result) for left, right, rank, result in slots[taken].tolist()}
    assert found == {
        (vocab[left], vocab[right]): (rank, vocab[left + right])
        for rank, (left, right) in enumerate(document["merges"])
    }
    probes = HEADER.unpack_from(table)[7]
    first = first_slots(slots[taken, 0], slots[taken, 1], len(slots))
    assert ((np.flatnonzero(taken) - first) % len(slots)).max() + 2 == probes


@pytest.mark.parametrize("name", names())
def test_pieces_are_what_the_library_decodes(name: str) -> None:
    table = compiled(name)
    offsets = numbers(table, Section.PIECE_OFFSETS)
    pieces = table[slice(*section(table, Section.PIECES))]
    tokenizer = reference(name)
    for id_ in range(len(offsets) - 1):
        piece = pieces[offsets[id_] : offsets[id_ + 1]]
        assert piece.decode("utf-8", "replace") == tokenizer.decode([id_], skip_special_tokens=False)
        assert bool(piece) == (tokenizer.id_to_token(id_) is not None)


def changed(name: str = "qwen2", **parts: Any) -> str:
    return json.dumps(json.loads(tokenizer_json(name)) | parts)


def changed_model(name: str = "qwen2", **parts: Any) -> str:
    document = json.loads(tokenizer_json(name))
    return json.dumps(document | {"model": document["model"] | parts})


def with_token(text: str) -> str:
    document = json.loads(tokenizer_json("qwen2"))
    document["model"]["vocab"][text] = 100_000
    return json.dumps(document)


def changed_added(**flags: Any) -> str:
    document = json.loads(tokenizer_json("qwen2"))
    document["added_tokens"][-1] |= flags
    return json.dumps(document)


def with_bos() -> str:
    model = json.loads(tokenizer_json("gpt2"))["model"]
    end = AddedToken("<s>", special=True, normalized=False)
    vocab = model["vocab"] | {"<s>": len(model["vocab"])}
    merges = [tuple(merge) for merge in model["merges"]]
    return byte_level_bpe(vocab, merges, pre="smollm", added={vocab["<s>"]: end}, bos="<s>").to_str()


SPLIT = json.loads(tokenizer_json("qwen2"))["pre_tokenizer"]["pretokenizers"][0]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "pattern": (
        lambda: changed(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": r"\p{N}{1,3}"}}, BYTES]}
        ),
        r"its pre-tokenizer is \[\{\"type\": \"Split\", .*p\{N\}\{1,3\}.*compiled are Qwen2's split and ByteLevel,",
    ),
    "behavior": (
        lambda: changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT | {"behavior": "Removed"}, BYTES]}),
        r"its pre-tokenizer is .*Removed",
    ),
    "prefix space": (lambda: changed(pre_tokenizer=BYTES | {"add_prefix_space": True}), '"add_prefix_space": true'),
    "no split": (lambda: changed(pre_tokenizer=BYTES), '"use_regex": false'),
    "no pre-tokenizer": (lambda: changed(pre_tokenizer=None), r"its pre-tokenizer is \[\]"),
    "normalizer": (
        lambda: changed(normalizer={"type": "NFKC"}),
        r'its normalizer is .*"NFKC".*; compiled is NFC, or none',
    ),
    "decoder": (lambda: changed(decoder=None), "its decoder is null; compiled is ByteLevel"),
    "post-processor": (with_bos, r"its post_processor is .*TemplateProcessing.*nothing is put around a text"),
    "model": (
        lambda: changed(
            model={
                "type": "WordPiece",
                "unk_token": "a",
                "continuing_subword_prefix": "#",
                "max_input_chars_per_word": 100,
                "vocab": {"a": 0},
            }
        ),
        r"its model is \"WordPiece\"; compiled is BPE over bytes",
    ),
    "dropout": (lambda: changed_model(dropout=0.5), r"its dropout is 0\.5; compiled is none"),
    "suffix": (
        lambda: changed_model(vocab={"a": 0}, merges=[], end_of_word_suffix="</w>"),
        "its end_of_word_suffix is",
    ),
    "prefix": (
        lambda: changed_model(vocab={"a": 0}, merges=[], continuing_subword_prefix="##"),
        "its continuing_subword_prefix is",
    ),
    "ignore_merges": (lambda: changed_model(ignore_merges=True), "its ignore_merges is true; compiled is false"),
    "unk_token": (
        lambda: changed_model("smollm2", unk_token="!"),
        r"its vocabulary lacks \d+ bytes and it has unk_token \"!\"; compiled is one without",
    ),
    "byte_fallback": (lambda: changed_model("smollm2", byte_fallback=True), "it has byte_fallback true"),
    "lstrip": (lambda: changed_added(lstrip=True), "its added token '<tool>é你' has lstrip; compiled is none that has"),
    "rstrip": (lambda: changed_added(rstrip=True), "has rstrip"),
    "single_word": (lambda: changed_added(single_word=True), "has single_word"),
    "normal form": (
        lambda: changed_added(content="e\u0301", normalized=True),
        "its added token 'e\u0301' is looked for as 'é'; compiled is one in normal form",
    ),
    "long added": (
        lambda: changed_added(content="é" * 129),
        r"its added token \d+ has 258 bytes; compiled is one of at most 256",
    ),
    "long token": (
        lambda: with_token("a" * 4097),
        r"its token \d+ stands for 4097 bytes; compiled is one of at most 4096",
    ),
    "merged": (lambda: changed_added(content="in", id=257), "its added token 'in' is also what bytes and merges make"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_another_shape_is_refused_by_name(text: Callable[[], str], message: str) -> None:
    with pytest.raises(TokenizerNotCompiledError, match=message):
        compile_tokenizer(text(), vocab_size=VOCAB_SIZE)
    assert issubclass(TokenizerNotCompiledError, BuildError)


def test_what_changes_no_id_is_taken() -> None:
    """Where every byte has a token, none is unknown; offsets aren't compiled."""
    for text in (
        changed_model(unk_token="!", byte_fallback=True, fuse_unk=True),
        changed_model(continuing_subword_prefix="", end_of_word_suffix=""),
        changed(post_processor=BYTES | {"use_regex": True, "add_prefix_space": True}),
        changed(truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}),
    ):
        assert compile_tokenizer(text, vocab_size=VOCAB_SIZE) == compiled("qwen2")


def test_ids_beyond_the_model() -> None:
    assert compile_tokenizer(tokenizer_json("gpt2"), vocab_size=334) == compiled("gpt2")
    with pytest.raises(TokenizerNotCompiledError, match=r"its largest id is 333, and the model's vocabulary has 333"):
        compile_tokenizer(tokenizer_json("gpt2"), vocab_size=333)


def test_two_tokens_of_one_id() -> None:
    document = json.loads(tokenizer_json("gpt2"))
    del document["model"]["vocab"]["!"]  # the library counts, and gives the first added token the id of the last merge
    with pytest.raises(TokenizerNotCompiledError, match="have the same id 329"):
        compile_tokenizer(json.dumps(document), vocab_size=VOCAB_SIZE)


def test_of_a_merge_that_stands_twice_the_last_counts() -> None:
    document = json.loads(tokenizer_json("gpt2"))
    document["model"]["merges"].append(document["model"]["merges"][3])
    table = compile_tokenizer(json.dumps(document), vocab_size=VOCAB_SIZE)  # proven against the library
    assert table != compiled("gpt2")


def damaged(name: str, which: Section, change: Callable[[np.ndarray[Any, Any]], None], dtype: str = "<u4") -> bytes:
    table = bytearray(compiled(name))
    start, stop = section(bytes(table), which)
    values = np.frombuffer(bytes(table[start:stop]), dtype).copy()
    change(values)
    table[start:stop] = values.tobytes()
    return bytes(table)


def swap(first: int, second: int) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[[first, second]] = values[[second, first]]

    return change


def clear(bit: int) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(values: np.ndarray[Any, Any]) -> None:
        values &= ~bit & 0xFF

    return change


def add(start: int, step: int, amount: int) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[start::step] += amount

    return change


WRONG = {
    "byte ids": damaged("qwen2", Section.BYTE_IDS, swap(97, 101)),
    "a merge's result": damaged("qwen2", Section.MERGES, add(3, 4, 1)),
    "letters": damaged("qwen2", Section.CLASS_PAGES, clear(1), "u1"),
    "numbers": damaged("qwen2", Section.CLASS_PAGES, clear(2), "u1"),
    "white space": damaged("qwen2", Section.CLASS_PAGES, clear(4), "u1"),
    "digits": damaged("smollm2", Section.CLASS_PAGES, clear(8), "u1"),
    "what NFC touches": damaged("qwen2", Section.CLASS_PAGES, clear(16), "u1"),
    "an added token": damaged("qwen2", Section.ADDED, add(0, 5, 1)),
    "decompositions": damaged("qwen2", Section.DECOMPOSED, add(0, 1, 1)),
    "orders": damaged("qwen2", Section.COMBINING, lambda values: values.__setitem__(slice(1, None, 2), 1)),
    "compositions": damaged("qwen2", Section.COMPOSITIONS, add(2, 3, 1)),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_proof_sees_a_wrong_table(what: str) -> None:
    name = "smollm2" if what == "digits" else "qwen2"
    assert find_difference(compiled(name), reference(name)) is None
    assert find_difference(WRONG[what], reference(name)) is not None


def test_a_table_that_is_not_proven_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_tokenizer, "_splitter", lambda pre_tokenizer: Splitter.GPT2)
    with pytest.raises(TokenizerNotCompiledError, match=r"its compiled form isn't the same: .* is split into"):
        compile_tokenizer(tokenizer_json("qwen2"), vocab_size=VOCAB_SIZE)


def test_the_proof_s_texts_reach_every_rule() -> None:
    """Each kind of thing that the rules tell apart is in many of them."""
    joined = qtok_proof.texts(reference("qwen2"), 1500)
    text = "".join(joined)
    for needle in ("<|im_end|>", "'ll", "'ſ", "\r", "\u3000", "\u0301", "\u1100", "\u11a8", "Ⅷ"):
        assert text.count(needle) >= 3, needle
    tokenizer = Tokenizer(reference("qwen2"), {}, vocab_size=VOCAB_SIZE)
    assert sum(any(id_ in tokenizer.special_ids for id_ in tokenizer.encode(each)) for each in joined) > 200


def test_the_reference_is_read_as_the_library_writes_it() -> None:
    """Older files write merges as one text."""
    document = json.loads(tokenizer_json("gpt2"))
    document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]
    del document["model"]["byte_fallback"], document["model"]["ignore_merges"]
    assert RustTokenizer.from_str(json.dumps(document)).get_vocab_size() == 334
    assert compile_tokenizer(json.dumps(document), vocab_size=VOCAB_SIZE) == compiled("gpt2")


def test_numbers_are_little_endian() -> None:
    table = compiled("gpt2")
    start, _ = section(table, Section.BYTE_IDS)
    assert struct.unpack_from("<I", table, start + 4 * ord("!"))[0] == 0
    assert table[start + 4 * ord("a") : start + 4 * ord("a") + 4] == b"\x40\0\0\0"
