"""The C detokenizer gives the Python one's text, piece by piece."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.runtime.text.detokenizer import byte_of_character, make_detokenizer
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.runtime.capi.native import Native, ask
from tests.runtime.compiled_texts import VOCAB_SIZE, names, reference, write_compiled
from tests.runtime.texts import GOLDEN

CASES = json.loads((GOLDEN / "detokenization.json").read_text(encoding="utf-8"))["cases"]
NAMES = names()


class Program:
    """The program of src/tokenizer.cpp with every tokenizer of these tests."""

    def __init__(self, native: Native, folder: Path) -> None:
        self._program = native.program("tokenizer")
        self._files = [write_compiled(folder, name) for name in NAMES]

    def pieces(self, name: str, sequences: list[list[int]]) -> list[Any]:
        table = NAMES.index(name)
        requests = [{"do": "detokenize", "table": table, "ids": ids} for ids in sequences]
        return ask(self._program, requests, *self._files)


@pytest.fixture(scope="module")
def program(native: Native, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(native, tmp_path_factory.mktemp("qtok"))


def by_python(name: str, sequences: list[list[int]]) -> list[list[str]]:
    tokenizer = Tokenizer(reference(name), {}, vocab_size=VOCAB_SIZE)
    pieces = []
    for ids in sequences:
        detokenizer = make_detokenizer(tokenizer)
        pieces.append([*(detokenizer.push(id_) for id_ in ids), detokenizer.flush()])
    return pieces


def test_golden(program: Program) -> None:
    found = program.pieces("gpt2", [case["ids"] for case in CASES])
    assert ["".join(pieces) for pieces in found] == [case["text"] for case in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_the_python_runtime_s(program: Program, name: str) -> None:
    """Any ids: special ones, such as the tokenizer lacks, and bytes that are no text."""
    rng = random.Random(4)
    size = reference(name).get_vocab_size() + 20
    alone = [[id_] for id_ in range(min(size, 400))]
    sequences = alone + [[rng.randrange(size) for _ in range(rng.randrange(60))] for _ in range(800)]
    assert program.pieces(name, sequences) == by_python(name, sequences)


def test_bytes_that_are_no_text(program: Program) -> None:
    """Bytes in any order, with many that begin or continue characters."""
    tokenizer = reference("gpt2")
    ids = {byte: tokenizer.token_to_id(character) for character, byte in byte_of_character().items()}
    rng = random.Random(8)
    likely = [*range(0x80, 0xC2), 0xE0, 0xE1, 0xED, 0xEE, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF, 0x41, 0x8F, 0x90, 0x9F, 0xA0]
    data = [bytes(rng.choices(likely, k=rng.randrange(1, 12))) for _ in range(4000)]
    found = program.pieces("gpt2", [[ids[byte] for byte in each] for each in data])
    assert ["".join(pieces) for pieces in found] == [each.decode("utf-8", "replace") for each in data]
    assert found == by_python("gpt2", [[ids[byte] for byte in each] for each in data])


def test_ids_beyond_the_vocabulary_have_no_text(program: Program) -> None:
    assert program.pieces("gpt2", [[-1, 64, 2**31 - 1, 334, 64]]) == [["", "a", "", "", "a", ""]]
