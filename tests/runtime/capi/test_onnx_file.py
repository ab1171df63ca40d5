"""The data files of a graph: the C reader tells those that the Python reader tells, and refuses what it refuses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.onnx_file import read_onnx_file
from tests.golden.make_layouts import external, graph
from tests.runtime.bundle.test_onnx_file import PLACES, WIDE, onnx_varint, with_wide_tag
from tests.runtime.capi.native import Native, ask


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("onnx_file")


def read(program: Path, contents: Sequence[bytes]) -> list[set[bytes] | str]:
    """Of each file its data files, or the refusal."""
    answers = ask(program, [{"hex": content.hex()} for content in contents])
    return [answer["message"] if "message" in answer else set(map(bytes.fromhex, answer)) for answer in answers]


def compare(program: Path, contents: Sequence[bytes], path: Path) -> int:
    """Both readers agree; returns how many files are refused."""
    refused = 0
    for content, found in zip(contents, read(program, contents), strict=True):
        path.write_bytes(content)
        try:
            locations = read_onnx_file(path).locations
        except BundleError:
            assert isinstance(found, str), content
            assert found.startswith("m.onnx isn't an ONNX model, or is damaged ("), found
            refused += 1
        else:
            assert found == {name.encode("utf-8", "surrogateescape") for name in locations}, content
    return refused


def test_locations_wherever_a_tensor_stands(program: Path, tmp_path: Path) -> None:
    contents = [graph("some/where", place) for place in PLACES]
    assert read(program, contents) == [{b"some/where"}] * len(PLACES)
    assert read(program, [graph("one") + graph("two"), b""]) == [{b"one", b"two"}, set()]
    assert compare(program, contents, tmp_path / "m.onnx") == 0


@pytest.mark.parametrize("number", [4000, pytest.param(60_000, marks=pytest.mark.deep)])
def test_damaged_files(program: Path, tmp_path: Path, number: int) -> None:
    rng = random.Random(1)
    contents = []
    for _ in range(number):
        content = bytearray(graph("some/where", rng.choice(PLACES)))
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.randrange(len(content))
            kind = rng.randrange(5)
            if kind == 0:
                del content[at:]
            elif kind == 1:
                content[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                content[at:at] = rng.choice([b"\x80" * 9 + b"\x7f", b"\xff" * 9 + b"\x01", b"\x80" * 11, b"\x2a\x00"])
            elif kind == 3:
                content[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x3A, 0x6A])
            else:
                start = rng.randrange(len(content))
                content[at:at] = content[start : start + rng.randrange(20)]
            content = content or bytearray(b"\x00")
        contents.append(bytes(content))
    refused = compare(program, contents, tmp_path / "m.onnx")
    assert number / 4 < refused < number * 9 / 10


def test_numbers_beyond_64_bits(program: Path, tmp_path: Path) -> None:
    """A field's tag and length of 70 bits are none, for either reader; a number of them is passed over."""
    beyond = b"\x80" * 9
    tensor = graph("x")
    contents = [
        b"\x08" + beyond + b"\x7f" + tensor,
        b"\x3a" + beyond + b"\x02" + tensor,
        b"\xba" + beyond[1:] + b"\x02\x00",
    ]
    assert compare(program, contents, tmp_path / "m.onnx") == 2


def test_a_tag_of_more_than_32_bits_hides_no_file(program: Path, tmp_path: Path) -> None:
    """The library that runs the model reads the file by such a tag: the Python reader's test of this name shows it."""
    assert read(program, [with_wide_tag(None)]) == [{b"w.bin"}]
    contents = [with_wide_tag(wide) for wide in WIDE]
    assert all("a field's number and type of more than 32 bits" in found for found in read(program, contents))
    assert compare(program, contents, tmp_path / "m.onnx") == len(WIDE)


def test_a_depth_that_would_end_a_recursion(program: Path) -> None:
    content = external("deep").SerializeToString()
    content = b"\x2a" + bytes([len(content)]) + content  # a graph
    for _ in range(3000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # of an attribute, a node, a graph
            content = tag + onnx_varint(len(content)) + content
    assert read(program, [b"\x3a" + onnx_varint(len(content)) + content]) == [{b"deep"}]


def test_the_comparison_sees_a_difference(program: Path, tmp_path: Path) -> None:
    """Negative control: the answer to another file."""
    (found,) = read(program, [graph("other")])
    (tmp_path / "m.onnx").write_bytes(graph("some"))
    assert found != {name.encode() for name in read_onnx_file(tmp_path / "m.onnx").locations}
