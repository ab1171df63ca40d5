"""The C tokenizer gives the ids of the `tokenizers` library and of the Python runtime; damaged files are refused."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle import compiled_tokenizer
from qwen_aot.engines.bundle.compiled_tokenizer import compile_tokenizer
from qwen_aot.engines.bundle.qtok import Section
from qwen_aot.engines.bundle.qtok_proof import library_words, texts
from qwen_aot.runtime.text.control_tokens import ControlTokens
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.runtime.capi.native import FLAVOURS, Native, ask
from tests.runtime.compiled_texts import (
    TOKENIZATION,
    VOCAB_SIZE,
    compiled,
    names,
    reference,
    tokenizer_json,
    write_compiled,
)

NAMES = names()
BUNDLE, INVALID_ARGUMENT = 4, 1


class Program:
    """The program of src/tokenizer.cpp with every tokenizer of these tests."""

    def __init__(self, native: Native, folder: Path) -> None:
        self._program = native.program("tokenizer")
        self._files = [write_compiled(folder, name) for name in NAMES]

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[Any]:
        return ask(self._program, requests, *self._files)

    def encode(self, name: str, asked: Sequence[str], *, allow: bool = True) -> list[Any]:
        table = NAMES.index(name)
        return self.ask([{"do": "encode", "table": table, "text": text, "allow": allow} for text in asked])


@pytest.fixture(scope="module")
def program(native: Native, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(native, tmp_path_factory.mktemp("qtok"))


def by_library(name: str, asked: list[str]) -> list[list[int]]:
    found = []
    for start in range(0, len(asked), 256):  # an encoding has much more than ids: of all texts it would be gigabytes
        batch = asked[start : start + 256]
        found += [encoding.ids for encoding in reference(name).encode_batch(batch, add_special_tokens=False)]
    return found


def runtime(name: str) -> Tokenizer:
    return Tokenizer(reference(name), {}, vocab_size=VOCAB_SIZE)


def differing(asked: Sequence[str], found: Sequence[Any], expected: Sequence[Any]) -> list[Any]:
    return [each for each in zip(asked, found, expected, strict=True) if each[1] != each[2]]


@pytest.mark.parametrize("allow", [True, False], ids=["special", "plain"])
def test_golden(program: Program, allow: bool) -> None:
    key = "ids" if allow else "plain_ids"
    for name in ("gpt2", "qwen2", "smollm2"):
        cases = [case for case in TOKENIZATION["cases"] if case["tokenizer"] == name]
        assert len(cases) > 20
        asked = [case["text"] for case in cases]
        assert differing(asked, program.encode(name, asked, allow=allow), [case[key] for case in cases]) == []
    assert any(case["ids"] != case["plain_ids"] for case in TOKENIZATION["cases"])


def test_golden_texts_that_are_not_utf8(program: Program) -> None:
    cases = TOKENIZATION["invalid"]
    answers = program.ask([{"do": "encode", "table": 0, "hex": case["hex"], "allow": True} for case in cases])
    for case, answer in zip(cases, answers, strict=True):
        assert answer["status"] == INVALID_ARGUMENT
        byte = int(case["hex"][2 * case["byte"] : 2 * case["byte"] + 2], 16)
        assert answer["message"] == (
            f"the text isn't UTF-8 (byte {case['byte']} is 0x{byte:02x}, which no character has there): give UTF-8 text"
        )


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_library_s(program: Program, name: str) -> None:
    asked = texts(reference(name), 3000)
    assert differing(asked, program.encode(name, asked), by_library(name, asked)) == []


@pytest.mark.parametrize("name", NAMES)
def test_words_are_the_library_s(program: Program, name: str) -> None:
    """Normal form and split for themselves: with few merges, ids don't depend on where words end."""
    asked = texts(reference(name), 2000)
    found = program.ask([{"do": "words", "table": NAMES.index(name), "text": text} for text in asked])
    assert differing(asked, found, [library_words(reference(name), text) for text in asked]) == []


@pytest.mark.parametrize("name", NAMES)
def test_more_marks_in_a_row_than_are_sorted_by_insertion(program: Program, name: str) -> None:
    """Of all orders, and with marks of one order, which stay as they stand."""
    rng = random.Random(7)
    marks = [chr(code) for code in range(0x300, 0x370)] + [chr(code) for code in range(0x591, 0x5BE)]
    asked = [
        "a" + "".join(rng.choices(marks[: rng.choice([3, 30, len(marks)])], k=rng.randrange(31, 101))) + " x"
        for _ in range(200)
    ]
    assert differing(asked, program.encode(name, asked), by_library(name, asked)) == []
    found = program.ask([{"do": "words", "table": NAMES.index(name), "text": text} for text in asked])
    assert differing(asked, found, [library_words(reference(name), text) for text in asked]) == []


@pytest.mark.deep
@pytest.mark.parametrize("name", NAMES)
def test_ids_of_many_texts_are_the_library_s(program: Program, name: str) -> None:
    asked = texts(reference(name), 80_000)
    assert differing(asked, program.encode(name, asked), by_library(name, asked)) == []


@pytest.mark.deep
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "smollm2"])
def test_every_character(program: Program, name: str) -> None:
    """All of Unicode alone; what may be assigned between letters, digits and spaces, and before a mark, too."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    assigned = [character for character in characters if not 0x32400 <= ord(character) < 0xE0000]
    assigned = assigned[: assigned.index("\U000e0200")]  # behind it all are for private use
    around = ("{}", "'{}l", "a{}b", "1{} {}\n", "x{}\u0301\u0323", "\u1100{}\u11a8")
    for form in around:
        tried = characters if form == "{}" else assigned
        lines = [
            "\n\n~".join(form.format(character, character) for character in tried[start : start + 64])
            for start in range(0, len(tried), 64)
        ]
        for start in range(0, len(lines), 1024):  # all at once would be gigabytes of ids
            asked = lines[start : start + 1024]
            assert differing(asked, program.encode(name, asked), by_library(name, asked)) == []
            found = program.ask([{"do": "words", "table": NAMES.index(name), "text": text} for text in asked])
            assert differing(asked, found, [library_words(reference(name), text) for text in asked]) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "many"])  # see test_overlapping_tokens
def test_special_tokens_as_plain_text(program: Program, name: str) -> None:
    tokenizer = runtime(name)
    asked = texts(reference(name), 1500)
    expected = [tokenizer.encode(text, allow_special_tokens=False) for text in asked]
    assert differing(asked, program.encode(name, asked, allow=False), expected) == []
    assert expected != by_library(name, asked)


@settings(max_examples=12, deadline=None)  # each starts the program
@given(asked=st.lists(st.text(max_size=40), min_size=20, max_size=60))
def test_any_text(program: Program, asked: list[str]) -> None:
    for name in NAMES:
        assert differing(asked, program.encode(name, asked), by_library(name, asked)) == []


def test_control_tokens_of_a_template(program: Program) -> None:
    """A set that is larger than the special tokens, as a chat template's may be."""
    tokenizer = reference("qwen2")
    control = ControlTokens(tokenizer, others=["<tool>é你"])
    ids = sorted(id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.content in control.all)
    assert len(ids) == 4
    asked = texts(tokenizer, 1000)
    found = program.ask(
        [{"do": "encode", "table": NAMES.index("qwen2"), "text": text, "without": ids} for text in asked]
    )
    expected = [control.encode(text, []) for text in asked]
    assert differing(asked, found, expected) == []
    assert expected != [runtime("qwen2").encode(text, allow_special_tokens=False) for text in asked]


def test_added_tokens_are_found_leftmost_and_longest(program: Program) -> None:
    """As the library cuts a text: found by its offsets, in texts of nothing but added tokens and their parts."""
    tokenizer = reference("gpt2")
    added = tokenizer.get_added_tokens_decoder()
    rng = random.Random(5)
    pieces = [token.content for token in added.values()] + ["<|im", "_end|>", "<tool>", "x", "é"]
    asked = ["".join(rng.choices(pieces, k=8)) for _ in range(300)]
    found = program.ask([{"do": "find_added", "table": 0, "text": text} for text in asked])
    for text, places in zip(asked, found, strict=True):
        encoding = tokenizer.encode(text)
        expected = [
            [len(text[:start].encode()), len(text[:end].encode()), id_]
            for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if id_ in added
        ]
        assert places == expected


def test_ids_by_spelling(program: Program) -> None:
    tokens = reference("many").get_added_tokens_decoder()
    spellings = {token.content: (id_, token.special) for id_, token in tokens.items()}
    asked = [*spellings, "", "<|im_", "<|im_end|>x", "hello"]
    found = program.ask([{"do": "facts", "table": NAMES.index("many"), "text": text} for text in asked])
    for text, answer in zip(asked, found, strict=True):
        id_, is_special = spellings.get(text, (-1, False))
        assert answer == [id_, id_ if is_special else -1], text


def test_long_words_take_time_in_proportion(program: Program) -> None:
    """A megabyte of one letter or of marks is a word of a million bytes."""
    words = ["a", " ", "<", "é", "\u0301\u0323", "0", "\n", "'s", "<|im_end|"]
    for name in ("qwen2", NAMES[-1]):
        requests = [
            {"do": "measure", "table": NAMES.index(name), "text": word * (1_000_000 // len(word.encode())), "runs": 1}
            for word in words
        ]
        slow = {
            word: seconds
            for word, (_, seconds, _) in zip(words, program.ask(requests), strict=True)
            if seconds > 5  # well under one alone; a quadratic one takes minutes
        }
        assert slow == {}


def refused(program: Program, path: Path, vocab_size: int = VOCAB_SIZE) -> str:
    (answer,) = program.ask([{"do": "open", "path": str(path), "vocab_size": vocab_size}])
    assert isinstance(answer, dict) and answer["status"] == BUNDLE, answer
    message: str = answer["message"]
    return message


def test_what_opens_and_what_does_not(program: Program, tmp_path: Path) -> None:
    path = write_compiled(tmp_path, "gpt2")
    assert program.ask([{"do": "open", "path": str(path), "vocab_size": 334}]) == [[330, 331, 332]]
    assert refused(program, path, 333) == (
        "the compiled tokenizer has 334 ids, and the model 333: it is the tokenizer of another model; build the bundle "
        "again"
    )
    table = compiled("gpt2")
    for content, message in [
        (b"", "this is no compiled tokenizer"),
        (b"{}" * 100, "this is no compiled tokenizer"),
        (table[:8] + b"\x02" + table[9:], "of version 2; this library reads version 1: build the bundle again"),
        (table[:-1], f"has {len(table) - 1} bytes, and says that it has {len(table)}: it was cut or added to"),
        (table + b"\0", "it was cut or added to"),
        (table[:-1] + b"\xff", "checksum doesn't fit its content: it is damaged; build the bundle again"),
    ]:
        path.write_bytes(content)
        assert message in refused(program, path)


def test_damaged_files_do_not_open(program: Program) -> None:
    """Every byte of the header's and directory's, and bits all over the file."""
    (found,) = program.ask([{"do": "damage", "table": 0, "step": 61}])
    assert found == [0, 0]


@pytest.mark.deep
def test_no_flipped_bit_and_no_cut_opens(program: Program) -> None:
    (found,) = program.ask([{"do": "damage", "table": 0, "step": 1}])
    assert found == [0, 0]


def test_added_tokens_do_not_share_bytes(program: Program, tmp_path: Path) -> None:
    """Else each of a vocabulary's could be all of their texts, and a few megabytes take days to check."""
    content = bytearray(compiled("qwen2"))
    rows, rows_size, _, _, _, _ = struct.unpack_from("<6Q", content, 64 + 16 * 6)  # added tokens, texts behind two more
    _, texts_size = struct.unpack_from("<2Q", content, 64 + 16 * 8)
    assert rows_size // 20 > 2
    offset, length = struct.unpack_from("<2I", content, rows + 8)
    struct.pack_into("<I", content, rows + 12, texts_size - offset)
    assert length < texts_size - offset
    struct.pack_into("<I", content, 12, zlib.crc32(content[16:]))
    (tmp_path / "shared.qtok").write_bytes(content)
    assert "an added token without an id or a text" in refused(program, tmp_path / "shared.qtok")


def test_added_tokens_and_pieces_have_a_length(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a small file makes each byte of a text, or each token of an answer, cost megabytes."""
    path = tmp_path / "long.qtok"
    monkeypatch.setattr(compiled_tokenizer, "MAX_ADDED", 1 << 20)
    monkeypatch.setattr(compiled_tokenizer, "MAX_PIECE", 1 << 20)
    document = json.loads(tokenizer_json("qwen2"))
    for length, opens in ((256, True), (257, False)):
        document["added_tokens"][-1]["content"] = "~" * length
        path.write_bytes(compile_tokenizer(json.dumps(document), vocab_size=VOCAB_SIZE))
        if not opens:
            assert "an added token longer than any that is compiled" in refused(program, path)
        else:
            (answer,) = program.ask([{"do": "open", "path": str(path), "vocab_size": VOCAB_SIZE}])
            assert isinstance(answer, list)
    document = json.loads(tokenizer_json("qwen2"))
    document["model"]["vocab"] |= {"~" * 4096: 100_000, "~" * 4097: 100_001}
    path.write_bytes(compile_tokenizer(json.dumps(document), vocab_size=VOCAB_SIZE))
    answers = program.ask(
        [{"do": "open", "path": str(path), "vocab_size": VOCAB_SIZE, "piece": 100_000 + i} for i in (0, 1)]
    )
    assert answers == [4096, 0]


def test_a_normal_form_that_grows_beyond_all_reason(program: Program, tmp_path: Path) -> None:
    """Its table says that the sign of angstroms becomes 18 characters: no text's normal form is so long."""
    content = bytearray(compiled("qwen2"))
    sections = [struct.unpack_from("<2Q", content, 64 + 16 * number) for number in range(13)]
    rows, size = sections[Section.DECOMPOSITIONS]
    row = next(at for at in range(rows, rows + size, 12) if struct.unpack_from("<I", content, at) == (0x212B,))
    struct.pack_into("<2I", content, row + 4, 0, 18)
    struct.pack_into("<I", content, 12, zlib.crc32(content[16:]))
    path = tmp_path / "grown.qtok"
    path.write_bytes(content)
    (answer,) = program.ask([{"do": "open", "path": str(path), "vocab_size": VOCAB_SIZE, "text": "\u212b" * 10}])
    assert answer["status"] == BUNDLE and "bytes of normal form out of 30: it is damaged" in answer["message"]


def forge(program: Program, runs: int) -> None:
    text = "Hello é e\u0301 한국어 \u1112\u1161\u11ab <|im_end|> 123 a\u0323\u0307 <tool>é你  \n x" + "ab" * 40
    requests = [
        {"do": "forge", "table": NAMES.index(name), "seed": seed, "runs": runs, "text": text}
        for seed, name in enumerate(("gpt2", "qwen2", "smollm2", "many"))
    ]
    for answer in program.ask(requests):
        assert isinstance(answer, list), answer
        opened, refused_ = answer
        assert opened > runs // 20 and refused_ > runs // 20  # both are tried


def test_forged_files_do_no_harm(program: Program) -> None:
    """Whose checksum fits: they are refused, or everything that they give is inside of the vocabulary."""
    forge(program, 2000)


@pytest.mark.deep
def test_under_sanitizers(native_folder: Path, tmp_path: Path) -> None:
    assert "address" in FLAVOURS
    program = Program(Native(native_folder, "address"), tmp_path)
    for name in NAMES:
        asked = texts(reference(name), 2000)
        assert differing(asked, program.encode(name, asked), by_library(name, asked)) == []
        assert len(program.encode(name, asked, allow=False)) == len(asked)
    assert program.ask([{"do": "damage", "table": 0, "step": 37}]) == [[0, 0]]
    forge(program, 20_000)
    test_golden_texts_that_are_not_utf8(program)


def test_checksums(program: Program) -> None:
    rng = random.Random(9)
    sizes = [*range(0, 200), 1000, 4096, 65_537]
    data = [rng.randbytes(size) for size in sizes]
    found = program.ask([{"do": "checksums", "hex": each.hex()} for each in data])
    assert found == [[zlib.crc32(each)] * 2 for each in data]


def test_overlapping_tokens(program: Program) -> None:
    """Control tokens are left out of the search, so a text can't make one by what it puts beside it.

    The reference is the same tokenizer whose special tokens have names that no text spells. The Python runtime isn't
    asked: where an added token that is looked for in normalized text overlaps a special one, it doesn't tell them
    apart.
    """
    tokenizer = reference("many")
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        if token["special"]:
            token["content"] = f"\U000f0000{token['id']}"
    renamed = RustTokenizer.from_str(json.dumps(document))
    asked = texts(tokenizer, 1500)
    found = program.encode("many", asked, allow=False)
    expected = [encoding.ids for encoding in renamed.encode_batch(asked, add_special_tokens=False)]
    assert differing(asked, found, expected) == []
    assert not any(special.intersection(ids) for ids in found)
    assert any(special.intersection(ids) for ids in by_library("many", asked))
