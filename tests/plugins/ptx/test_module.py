"""What the interpreter reads of PTX text, and what it says of text that it doesn't understand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.plugins.ptx.interpreter import Interpreter, PtxError
from tests.plugins.ptx.programs import kernel, run

BODY = "\t.reg .b64 to;\n\t.reg .b32 a, b;\n\t.reg .pred p;\n\tld.param.b64 to, [target];\n"


def result(interpreter: Interpreter, body: str, words: int = 1) -> list[int]:
    """What one thread writes to `target`."""
    target = np.zeros(words, np.uint32)
    run(interpreter, kernel(["target"], BODY + body, threads=1), {"target": target}, threads=1)
    return [int(word) for word in target]


def test_a_module_says_what_it_is(interpreter: Interpreter) -> None:
    module = interpreter.load(kernel(["x", "y"], "\t.reg .b32 a;", threads=96))
    assert module.target == "sm_80" and module.unknown == []
    assert module.signature("one") == (96, [8, 8])
    with pytest.raises(PtxError, match="no kernel other"):
        module.signature("other")


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("12", 12),
        ("-1", 2**32 - 1),
        ("0x1F", 31),
        ("0x7773U", 0x7773),
        ("0f3F800000", 0x3F800000),
        ("010", 8),  # octal
        ("shared", 1024),
    ],
)
def test_constants(constant: str, value: int, interpreter: Interpreter) -> None:
    assert result(interpreter, f"\tmov.b32 a, {constant};\n\tst.global.b32 [to], a;") == [value]


def test_comments_scopes_ranges_and_offsets(interpreter: Interpreter) -> None:
    body = """
    // a comment; with a ; and a {
    .reg .b32 %r<3>; /* of several
    lines */ mov.b32 %r2, 5; mov.b32 a, 1;
    .pragma "nounroll";
    {
        .reg .b32 a; // another one
        mov.b32 a, 7;
        st.global.b32 [to+4], a;
    }
    st.global.b32 [ to + 8 ], %r2;
    add.s64 to, to, 16;
    st.global.b32 [to-16], a;
    """
    assert result(interpreter, body, words=4) == [1, 7, 5, 0]


def test_guards(interpreter: Interpreter) -> None:
    body = "\tmov.b32 a, 1;\n\tmov.b32 b, 2;\n\tsetp.eq.b32 p, a, b;\n"
    assert result(
        interpreter, f"{body}\t@p mov.b32 a, 9;\n\t@!p mov.b32 b, 8;\n\tst.global.v2.b32 [to], {{a, b}};", 2
    ) == [1, 8]


def test_unknown_forms_are_listed_and_never_skipped(interpreter: Interpreter) -> None:
    body = BODY + "\tsqrt.rn.f32 a, b;\n\tbrkpt;\n\tsqrt.rn.f32 a, {b};\n\tmov.b32 a, 1;"
    text = kernel(["target"], body, threads=1)
    first = 1 + next(at for at, line in enumerate(text.splitlines()) if "sqrt" in line)
    module = interpreter.load(text)
    assert module.unknown == [f"brkpt at line {first + 1}, 1 time", f"sqrt.rn.f32 at line {first}, 2 times"]
    with pytest.raises(
        PtxError, match=rf"doesn't know: brkpt at line {first + 1}, 1 time\nsqrt\.rn\.f32 at line {first}"
    ):
        run(interpreter, text, {"target": np.zeros(1, np.uint32)}, threads=1)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("mov.b32 a, c;", "there is no 'c'"),
        ("mov.b32 a, %tid.w;", "there is no '%tid.w'"),
        ("mov.b32 a, 12x;", "there is no '12x'"),
        ("mov.b32 a, 99999999999999999999;", "there is no '99999999999999999999'"),
        ("mov.b32 a, 0fXF800000;", "there is no '0fXF800000'"),
        (".reg .b32 %r<x>;", "'x' is no number"),
        (".reg .b33 b33;", "'.b33' is no type"),
        (".reg word b33;", "'word' is no type"),
        ("add.s32 a, b;", "add.s32 a, b has 2 operands, not 3"),
        ("ld.global.v4.b32 {a, b}, [to];", "3 operands, not 5"),
        ("mov.b32 12, a;", "its result isn't a register"),
        ("bra nowhere;", "there is no label nowhere"),
        ("ld.global.b32 a, [to;", "'\\]' was expected"),
        ("ld.global.b32 a, [to+b];", "an address without its offset"),
        ("mov.b32 a, b", "';' is missing"),
        (".section x", "'.section"),
        ("call f;", None),  # a form like another that isn't known
    ],
)
def test_text_that_is_not_understood(body: str, said: str | None, interpreter: Interpreter) -> None:
    text = kernel(["target"], BODY + f"\t{body}", threads=1)
    line = 1 + text.splitlines().index(f"\t{body}")
    if body.endswith("b"):  # the text's last statements run together
        text = text[: text.index(body) + len(body)]
    if said is None:
        assert interpreter.load(text).unknown
        return
    with pytest.raises(PtxError, match=f"PTX line {line}: .*{said}"):
        interpreter.load(text)


@pytest.mark.parametrize("text", ["", ".version 8.8\n.target sm_80\n"])
def test_a_module_without_kernels(text: str, interpreter: Interpreter) -> None:
    with pytest.raises(PtxError, match="has no kernel one"):
        run(interpreter, text, {}, threads=1)


@pytest.mark.parametrize("text", [".func f { }", ".extern .global .b8 x[];", ".visible .entry one(.reg .b32 a)", "{"])
def test_a_module_with_what_is_not_modelled(text: str, interpreter: Interpreter) -> None:
    with pytest.raises(PtxError, match="PTX line 1: "):
        interpreter.load(text)
