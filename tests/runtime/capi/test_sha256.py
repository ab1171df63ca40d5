"""SHA-256 against hashlib, with the CPU's instructions and without."""

from __future__ import annotations

import hashlib
import platform
import random
from pathlib import Path

import pytest

from tests.runtime.capi.native import Native, ask


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("sha256")


def has_instructions() -> bool:
    """What Linux says of this CPU."""
    flag = {"x86_64": "sha_ni", "aarch64": "sha2"}[platform.machine()]
    return flag in Path("/proc/cpuinfo").read_text(encoding="ascii").split()


def check(program: Path, documents: list[list[bytes]]) -> None:
    answers = ask(program, [{"pieces": [piece.hex() for piece in pieces]} for pieces in documents])
    for pieces, answer in zip(documents, answers, strict=True):
        expected = hashlib.sha256(b"".join(pieces)).hexdigest()
        assert answer["default"] == answer["portable"] == expected
        assert answer["accelerated"] == (expected if has_instructions() else None)


def test_every_length_around_two_blocks(program: Path) -> None:
    content = random.Random(1).randbytes(200)
    check(program, [[content[:length]] for length in range(200)])


def test_pieces_of_any_length(program: Path) -> None:
    rng = random.Random(2)
    lengths = [0, 1, 2, 55, 56, 63, 64, 65, 127, 128, 129, 500]
    check(program, [[rng.randbytes(rng.choice(lengths)) for _ in range(rng.randrange(8))] for _ in range(300)])


def test_a_length_in_bits_of_more_than_a_byte(program: Path) -> None:
    check(program, [[b"\xff" * 100_003, b"a" * 31]])


@pytest.mark.deep
@pytest.mark.parametrize("size", [(1 << 29) + 7, (1 << 32) + 7])
def test_lengths_beyond_32_bits(program: Path, size: int) -> None:
    """In bits, and in bytes."""
    expected = hashlib.sha256()
    part = bytes(1 << 20)
    for start in range(0, size, len(part)):
        expected.update(part[: size - start])
    assert ask(program, [{"zeros": size}]) == [expected.hexdigest()]


def test_digests_as_text(program: Path) -> None:
    """Parsed as runtime/bundle/checks.py takes them: lower case, all 64."""
    digest = hashlib.sha256(b"x").hexdigest()
    refused = ["", digest[1:], digest + "0", digest.upper(), "g" + digest[1:], " " + digest[1:], digest[:-1] + "/"]
    refused += [digest[:-1] + ":", digest[:-1] + "`", digest[:-1] + "\n"]
    answers = ask(program, [{"parse": text} for text in [digest, "0123456789abcdef" * 4, *refused]])
    assert answers == [digest, "0123456789abcdef" * 4, *[None] * len(refused)]


@pytest.mark.skipif(not has_instructions(), reason="this CPU has no instructions for SHA-256")
def test_the_instructions_are_what_is_used(program: Path) -> None:
    """Negative control of the choice: they are several times as fast (1.5 against 0.2 GB/s where it was written)."""
    (answer,) = ask(program, [{"megabytes": 64}])
    assert answer["accelerated"] * 2 < answer["portable"]
