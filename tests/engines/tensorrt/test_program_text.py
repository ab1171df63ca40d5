"""The reader of TensorRT-RTX's program text, on texts written here by its grammar."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qwen_aot.engines.tensorrt import program_text
from qwen_aot.engines.tensorrt.program_text import Call, Program, Tensor, read_programs
from qwen_aot.errors import BuildError
from tests.engines.tensorrt.programs import constant, function, packed, program, tensor

STEP = program(
    [
        tensor("input_ids.1", "{ 1 \"n\" }", "int64"),
        tensor("n", "{ 1 }", "int64", host=True),
        constant("w", "{ 1 8 16 }", "int4", 64, place=3),
        tensor("y", '{ 1 "n" 16 }', "half"),
    ],
    [
        " label bb1: ",
        function("__myl_GathMul", ["input_ids.1", "w", "n"], ["y"], "[ONNX Layer: a][ONNX Layer: b | then | c (If)]"),
        "  cjmp={ name=\"x\" input={\"y\" } stream=0 op=eq target={bb2 bb3 } layers=\"\" }",
        " label bb2: ",
        "  runtime_fusion={ name=__myl_FcAdd input_args={ \"w\" } output_args={ \"y\" } binary=1 layers=\"\" }",
    ],
    is_step=True,
)  # fmt: skip


def written(path: Path, *texts: str, noise: bytes = b"\x00NLYM\x07") -> Path:
    path.write_bytes(noise + b"".join(packed(text) + noise for text in texts))
    return path


def test_a_program_is_read_whole(tmp_path: Path) -> None:
    (found,) = read_programs(written(tmp_path / "engine.rtx", STEP))
    assert found.is_step
    assert found.tensors["w"] == Tensor("w", (1, 8, 16), "int4", 64, "consts:3", is_host=False)
    assert found.tensors["y"] == Tensor("y", (1, "n", 16), "half", None, ":0", is_host=False)
    first, jump = found.blocks["bb1"]
    assert first == Call("function", "__myl_GathMul", ("input_ids.1", "w"), ("y",), ("a", "b"), (), None)
    assert jump.targets == ("bb2", "bb3")
    assert [call.fusion for call in found.blocks["bb2"]] == [1]
    assert [call.op for call in found.calls] == ["function", "cjmp", "runtime_fusion"]


def test_programs_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    fused = program([tensor("x", "{ 1 }", "half")], [" label bb1:"], is_step=False)
    found = read_programs(written(tmp_path / "engine.rtx", STEP, fused, STEP))
    assert [one.is_step for one in found] == [True, False, True]
    assert found[1] == Program({"x": Tensor("x", (1,), "half", None, ":0", is_host=False)}, {"bb1": ()}, is_step=False)


def test_an_engine_without_text_has_none(tmp_path: Path) -> None:
    assert read_programs(written(tmp_path / "engine.plan")) == []


def test_the_magic_word_among_weights_is_no_program(tmp_path: Path) -> None:
    noise = b"NLYM" + struct.pack("<IQ", 1, 10) + b"header [\n  "
    (found,) = read_programs(written(tmp_path / "engine.rtx", STEP, noise=noise))
    assert found.is_step


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace("descriptors {", "tensors {"), "sections"),
        (lambda text: text.replace("  cjmp={", "  cjmp "), "the line '  cjmp"),
        (lambda text: text.replace(" type=half }", " }"), "a tensor of"),
        (lambda text: text[: text.index("  runtime_fusion")], "sections"),
    ],
    ids=["section", "line", "tensor", "cut"],
)
def test_another_grammar_is_an_error(tmp_path: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    damaged = damage(STEP)
    assert damaged != STEP
    with pytest.raises(BuildError, match=rf"engine\.rtx holds a program that this version can't read: {said}"):
        read_programs(written(tmp_path / "engine.rtx", damaged))


@pytest.mark.parametrize("piece", [1, 7, 24, 25, 26, 1000])
def test_pieces_of_any_size_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    engine = written(tmp_path / "engine.rtx", STEP, STEP, noise=b"NLYMNLYM" + b"\x00" * 11)
    whole = read_programs(engine)
    assert len(whole) == 2
    monkeypatch.setattr(program_text, "_PIECE", piece)
    assert read_programs(engine) == whole


def test_a_length_beyond_the_file_reads_what_is_there(tmp_path: Path) -> None:
    text = packed(STEP)
    path = tmp_path / "engine.rtx"
    path.write_bytes(text[:8] + struct.pack("<Q", 1 << 62) + text[16:])
    (found,) = read_programs(path)
    assert found.is_step
