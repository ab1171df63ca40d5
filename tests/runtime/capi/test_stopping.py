"""Stop texts of the C library: what StopMatcher gives out, however the text is cut."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from qwen_aot.runtime.generation.stopping import StopMatcher
from tests.runtime.capi.native import Native, ask

# Characters of one to four bytes, some of which begin with the same bytes.
ALPHABETS = ["ab<", "aé≤", "é\u00eaè", "😀😁<", "a\0"]


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("generation")


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """The texts given out, the flushed one last, and whether a stop was met, by the Python runtime."""
    matcher = StopMatcher(stops)
    out = []
    for piece in pieces:
        text, is_stopped = matcher.push(piece)
        out.append(text)
        if is_stopped:
            return out, True
    return [*out, matcher.flush()], False


def text(random: Random, alphabet: str, least: int, most: int) -> str:
    return "".join(random.choice(alphabet) for _ in range(random.randint(least, most)))


def test_it_gives_out_what_the_python_one_does(program: Path) -> None:
    random = Random(11)
    cases: list[tuple[list[str], list[str]]] = [
        (["Hello", " wor", "ld EN", "D of", "x"], [" END"]),
        (["a<", "|b<|", "c"], ["<|end|>"]),
        (["a<|"], ["<|end|>"]),
        (["xabcx"], ["abc", "b"]),
        (["xabx"], ["b", "ab"]),
        (["a", "b"], []),
        ([], ["a"]),
    ]
    for _ in range(5000):
        alphabet = random.choice(ALPHABETS)
        pieces = [text(random, alphabet, 0, 12) for _ in range(random.randint(0, 6))]
        cases.append((pieces, [text(random, alphabet, 1, 4) for _ in range(random.randint(0, 3))]))
    answers = ask(program, [{"what": "stop", "pieces": pieces, "stops": stops} for pieces, stops in cases])
    stopped = 0
    for (pieces, stops), answer in zip(cases, answers, strict=True):
        assert (answer["texts"], answer["is_stopped"]) == run(pieces, stops), (pieces, stops)
        stopped += answer["is_stopped"]
    assert 1000 < stopped < len(cases) - 1000  # both happen
