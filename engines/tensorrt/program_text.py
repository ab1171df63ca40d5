"""The text in which TensorRT-RTX's engine files hold what was compiled: a program for each profile.

The file has, among kernels and weights, texts that begin with a magic word and their length in bytes (little-endian,
64 bits). Each lists the tensors (`descriptors`) and, in order, the calls of a step (`main`); a program that computes
shapes too (`shape_main`) is a profile's, and those behind it are what its fused kernels compute. No documentation of
the format exists: this is what TensorRT-RTX 1.7.1 writes, and whoever reads something else gets an error.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from qwen_aot.errors import BuildError

_MAGIC = b"NLYM"
_FIRST_WORDS = b"header {\n"
_LENGTH_AT, _TEXT_AT = 8, 16
_PIECE = 16 << 20  # bytes
_HOST = "100"  # `mem_prop` of the numbers that shapes are computed with
_SECTION = re.compile(r"^(\w+) \{\n(.*?)^\}$", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^\s+(\w+)=(\{.*\})\s*$")
_LABEL = re.compile(r"^\s*label (\w+):\s*$")
_TOKEN = re.compile(r'"[^"]*"|[{}=]|[^\s{}="]+')
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

Value: TypeAlias = "str | list[str] | dict[str, Value]"


@dataclass(frozen=True, slots=True)
class Tensor:
    """What a call reads or writes.

    Attributes:
        name: of an input or output of the graph, its name and a suffix; of others, the compiler's.
        dims: sizes, or the name of the number that is one.
        dtype: in the engine's word: half, float, bf16, fp8_e4m3, int8, int4, int32, int64, bool.
        constant_bytes: of a constant, as it is stored; None: it isn't one.
        place: of a constant, which one of all that the engine stores.
        is_host: a number in the host's memory.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: str
    constant_bytes: int | None
    place: str
    is_host: bool


@dataclass(frozen=True, slots=True)
class Call:
    """One line of a program.

    Attributes:
        op: function (a kernel of its own), fully_connected, runtime_fusion, copy, jmp, ...
        name: of the kernel or layer.
        inputs, outputs: names of tensors, without the numbers of shapes.
        layers: nodes of the ONNX graph of which it does a part.
        targets: labels that it may go to.
        fusion: of a runtime_fusion, which of the programs behind this one it computes.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]
    targets: tuple[str, ...]
    fusion: int | None


@dataclass(frozen=True, slots=True)
class Program:
    """The calls of one profile's step, or of one fused kernel.

    Attributes:
        tensors: by name; another name for a part of a tensor is one of its own.
        blocks: label -> calls, in order.
        is_step: it is a profile's.
    """

    tensors: Mapping[str, Tensor]
    blocks: Mapping[str, tuple[Call, ...]]
    is_step: bool

    @property
    def calls(self) -> Iterator[Call]:
        """All calls, of branches that exclude each other too."""
        for block in self.blocks.values():
            yield from block


def read_programs(engine: Path) -> list[Program]:
    """The programs of an engine file, in its order; none where it has no such text.

    Raises:
        BuildError: there is one that doesn't read as TensorRT-RTX 1.7.1 writes it.
    """
    with engine.open("rb") as file:
        return [_parse(text, engine.name) for text in _texts(file)]


def _texts(file: BinaryIO) -> Iterator[str]:
    for place in list(_places(file)):
        file.seek(place + _LENGTH_AT)
        (length,) = struct.unpack("<Q", file.read(_TEXT_AT - _LENGTH_AT))
        left = os.fstat(file.fileno()).st_size - file.tell()
        yield file.read(min(length, left)).decode("utf-8", errors="replace")


def _places(file: BinaryIO) -> Iterator[int]:
    """Where texts begin. The file is read a piece after the other: an engine may be larger than the memory."""
    whole = _TEXT_AT + len(_FIRST_WORDS)
    kept, start = b"", 0  # the end of the piece before, too short to hold a whole beginning; where it lies
    while piece := file.read(_PIECE):
        data = kept + piece
        at = data.find(_MAGIC)
        while at >= 0:
            if data[at + _TEXT_AT : at + whole] == _FIRST_WORDS:
                yield start + at
            at = data.find(_MAGIC, at + 1)
        kept = data[-(whole - 1) :]
        start += len(data) - len(kept)


def _parse(text: str, name: str) -> Program:
    sections = dict(_SECTION.findall(text))
    if not {"descriptors", "main"} <= sections.keys():
        raise _unknown(name, f"sections {sorted(sections)}")
    entries = [_entry(line, name) for line in sections["descriptors"].split("\n") if line.strip()]
    tensors: dict[str, Tensor] = {}
    for _, fields in entries:
        tensor = _tensor(fields, name)
        tensors[tensor.name] = tensor
    blocks: dict[str, tuple[Call, ...]] = {}
    label = ""
    for line in sections["main"].split("\n"):
        if (found := _LABEL.match(line)) is not None:
            label = found[1]
            blocks[label] = ()
        elif line.strip():
            op, fields = _entry(line, name)
            blocks[label] = (*blocks.get(label, ()), _call(op, fields, tensors))
    return Program(tensors, blocks, "shape_main" in sections)


def _unknown(name: str, found: str) -> BuildError:
    return BuildError(f"{name} holds a program that this version can't read: {found}")


def _entry(line: str, name: str) -> tuple[str, Mapping[str, Value]]:
    found = _ENTRY.match(line)
    if found is None:
        raise _unknown(name, f"the line {line[:80]!r}")
    tokens = _TOKEN.findall(found[2])
    value, end = _value(tokens, 0)
    if end != len(tokens) or not isinstance(value, dict):
        raise _unknown(name, f"the line {line[:80]!r}")
    return found[1], value


def _value(tokens: Sequence[str], at: int) -> tuple[Value, int]:
    """The value that begins at a token, and where it ends: a word, a list of words, or fields by name."""
    if at >= len(tokens):
        return "", at
    if tokens[at] != "{":
        return tokens[at].strip('"'), at + 1
    words: list[str] = []
    fields: dict[str, Value] = {}
    at += 1
    while at < len(tokens) and tokens[at] != "}":
        if at + 1 < len(tokens) and tokens[at + 1] == "=":
            fields[tokens[at]], at = _value(tokens, at + 2)
        else:
            words.append(tokens[at].strip('"'))
            at += 1
    return fields or words, at + 1


def _words(fields: Mapping[str, Value], *names: str) -> list[str]:
    """The first of the lists that is there."""
    for name in names:
        found = fields.get(name)
        if isinstance(found, list):
            return found
    return []


def _word(fields: Mapping[str, Value], name: str) -> str:
    found = fields.get(name, "")
    return found if isinstance(found, str) else ""


def _tensor(fields: Mapping[str, Value], file_name: str) -> Tensor:
    name, dtype, stored = (_word(fields, key) for key in ("name", "type", "const_payload_size"))
    if not name or not dtype:
        raise _unknown(file_name, f"a tensor of {sorted(fields)}")
    return Tensor(
        name=name,
        dims=tuple(int(dim) if dim.isdigit() else dim for dim in _words(fields, "dims")),
        dtype=dtype,
        constant_bytes=int(stored) if stored else None,
        place=f"{_word(fields, 'region').partition('-')[2]}:{_word(fields, 'offset')}",
        is_host=_word(fields, "mem_prop") == _HOST,
    )


def _call(op: str, fields: Mapping[str, Value], tensors: Mapping[str, Tensor]) -> Call:
    def devices(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in names if name in tensors and not tensors[name].is_host))

    fusion = _word(fields, "binary")
    return Call(
        op=op,
        name=_word(fields, "name"),
        inputs=devices(_words(fields, "input_args", "input")),
        outputs=devices(_words(fields, "output_args", "output")),
        layers=tuple(dict.fromkeys(layer.split(" | ")[0] for layer in _LAYER.findall(_word(fields, "layers")))),
        targets=tuple(_words(fields, "target")),
        fusion=int(fusion) if op == "runtime_fusion" and fusion.isdigit() else None,
    )
