"""The strict JSON reader takes what the Python reader takes, and reads the same from it."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.strict_json import parse_object
from tests.cpu_times import cpu_seconds
from tests.runtime.capi.native import Native, ask

MAX_DEPTH = 200


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("json")


def read(program: Path, documents: Sequence[bytes], *, is_from_checkpoint: bool = False) -> list[Any]:
    """What the C reader makes of each document: its value, or the message."""
    answers = ask(program, [{"hex": text.hex(), "is_from_checkpoint": is_from_checkpoint} for text in documents])
    return [plain(answer["document"]) if "document" in answer else Refusal(answer["message"]) for answer in answers]


class Refusal(str):
    """A message."""


def plain(answer: Any) -> Any:
    """An answer as Python holds documents, with objects as lists of pairs."""
    if isinstance(answer, list):
        return [plain(item) for item in answer]
    if not isinstance(answer, dict):
        return answer
    if "object" in answer:
        assert all(len(member) == 2 for member in answer["object"])  # else a key wasn't found
        return {key: plain(value) for key, value in answer["object"]}
    if "number" in answer:
        return float.fromhex(answer["number"])
    value = int(answer["integer"])
    assert answer["fits"] == (-(2**63) <= value < 2**63)
    assert int(answer["value"]) == (value if answer["fits"] else 0)
    return value


def expected(document: bytes, *, is_from_checkpoint: bool = False) -> Any:
    """What the Python reader makes of a document: its value, or None."""
    try:
        return parse_object(document.decode("utf-8"), "document", is_from_checkpoint=is_from_checkpoint)
    except (BundleError, UnicodeDecodeError):
        return None


def same(left: Any, right: Any) -> bool:
    """Equal in type, in the order of keys and to the bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return left == right and math.copysign(1, left) == math.copysign(1, right)
    return bool(left == right)


def compare(program: Path, documents: Sequence[bytes], *, is_from_checkpoint: bool = False) -> int:
    """Both readers agree on each document; returns how many are taken."""
    taken = 0
    for document, found in zip(documents, read(program, documents, is_from_checkpoint=is_from_checkpoint), strict=True):
        wanted = expected(document, is_from_checkpoint=is_from_checkpoint)
        if wanted is None:
            assert isinstance(found, Refusal), (document, found)
            assert found.startswith("document ")
        else:
            assert not isinstance(found, Refusal) and same(found, wanted), (document, found, wanted)
            taken += 1
    return taken


WORDS = """
    null true false nul nulll True NULL None undefined
    0 -0 00 01 -01 1 -1 +1 - --1 1. .5 1.5 -1.5 1.e5 1e5 1E5 1e+5 1e-5 1e 1e+ 1ee5 1.5e5.5 0x10 1_000 ٣ 1٣
    1e308 1e309 -1e400 1e-400 5e-324 2.4e-324 0e999999999999999999999 1e99999999999999999999 -1e-99999999999999999999
    9223372036854775807 9223372036854775808 -9223372036854775808 -9223372036854775809
    9007199254740993 18446744073709551616 1.7976931348623159e308 9007199254740993.0 0.1 -0.0 -0e5
    NaN Infinity -Infinity -NaN nan inf Infinit NaNN
"""
VALUES = [
    *WORDS.split(),
    "1" * 20,
    "1" * 21,
    "1" * 4000,
    "1" * 4001,
    "-" + "1" * 3999,
    "-" + "1" * 4000,
    "0." + "0" * 500 + "1",
    "1" + "0" * 400 + ".0",
    "1" + "0" * 400 + "e-400",
    "1" + "23" * 500 + "e-990",
    "1" + "0" * 999 + "1.5e-995",
    "0." + "123456789" * 200,
    '""',
    '"a"',
    '"a',
    'a"',
    "'a'",
    r'"\""',
    r'"\\"',
    r'"\/\b\f\n\r\t"',
    r'"\a"',
    r'"\x41"',
    r'"\U0041"',
    '"\\',
    r'"\u0041\u00e9\u20AC\uFFFF\u0000\u007f\u0080\u07ff\u0800"',
    r'"\ud83d\ude00"',
    r'"\uD83D\uDE00"',
    r'"\u00"',
    r'"\u004g"',
    r'"\u 041"',
    r'"\u+041"',
    r'"\u0_41"',
    r'"\ud83d"',
    r'"\ude00"',
    r'"\ude00\ude00"',
    r'"\ud83d\u0041"',
    r'"\ud83d\u"',
    r'"\ud83d\u12"',
    r'"\ud83d\uzzzz"',
    '"\x00"',
    '"\x1f"',
    '"\n"',
    '"\t"',
    '"\x7f"',
    '"\x80é€😀\U0010ffff"',
    "[]",
    "[1]",
    "[1,]",
    "[,1]",
    "[1 2]",
    "[1",
    "[",
    "]",
    "[[]]",
    "[[],[[]],{}]",
    "{}",
    "{,}",
    '{"a"}',
    '{"a":}',
    '{"a":1,}',
    '{"a":1 "b":2}',
    "{a:1}",
    "{1:1}",
    "{null:1}",
    '{"":{"":{}}}',
    '{"a":1,"a":1}',
    r'{"a":1,"\u0061":1}',
    '{"a":1,"b":{"a":1,"c":[{"a":1}]}}',
    '{"b":1,"a":{"x":1,"x":2}}',
    "/**/1",
    "1//",
    "\v1",
    "\f1",
    "\xa01",
    " \t\r\n1 \t\r\n",
]
DOCUMENTS = [
    "",
    " ",
    "{",
    "}",
    "{}",
    " {} ",
    "{}{}",
    "{} x",
    "{}\x00",
    "\ufeff{}",
    "null",
    "5",
    "[]",
    '"a"',
    "NaN",
    "[{}]",
    *('{"key": ' + value + "}" for value in VALUES),
    *("[" + value + "]" for value in VALUES),
    *('{"a": [' + value + ', 1], "b": ' + value + "}" for value in VALUES),
]


@pytest.mark.parametrize("is_from_checkpoint", [False, True])
def test_documents_by_hand(program: Path, is_from_checkpoint: bool) -> None:
    documents = [text.encode() for text in DOCUMENTS]
    taken = compare(program, documents, is_from_checkpoint=is_from_checkpoint)
    assert len(documents) / 5 < taken < len(documents) * 3 / 4


def test_bytes_that_are_no_utf8(program: Path) -> None:
    cut = "é€😀".encode()
    bad = [
        b"\x80",
        b"\xc0\xaf",
        b"\xc1\xbf",
        b"\xe0\x80\x80",
        b"\xed\xa0\x80",
        b"\xf0\x80\x80\x80",
        b"\xf4\x90\x80\x80",
    ]
    bad += [b"\xf5\x80\x80\x80", b"\xff", cut[:1], cut[2:4], cut[5:8], b"\xc3(", b"\xe2\x82(", b"\xf0\x9f\x98("]
    documents = [b'{"a": "' + text + b'"}' for text in bad] + [b'{"' + text + b'": 1}' for text in bad]
    assert compare(program, [*documents, *bad, b"{" + bad[0] + b"}"]) == 0
    assert all("UTF-8" in message for message in read(program, documents))


def generated(rng: random.Random, depth: int = 0) -> str:
    """A document's text; not all are taken."""
    space = "".join(rng.choices(" \t\r\n", k=rng.choice([0, 0, 0, 1, 2])))
    kind = rng.randrange(9 if depth < 5 else 5)
    if kind == 0:
        text = rng.choice(["null", "true", "false"])
    elif kind == 1:
        text = str(rng.choice([rng.randrange(-5, 5), rng.randrange(-(2**64), 2**64), rng.randrange(-(2**70), 2**70)]))
    elif kind == 2:
        digits = "".join(rng.choices("0123456789", k=rng.choice([1, 5, 17, 25, 40])))
        text = f"{rng.choice(['', '-'])}{rng.choice(['0', '7', '12', '9' * 30])}.{digits}"
        text += rng.choice(["", f"e{rng.randrange(-340, 340)}", f"E+{rng.randrange(320)}"])
    elif kind in (3, 4):
        text = generated_string(rng)
    elif kind in (5, 6):
        text = "[" + ",".join(generated(rng, depth + 1) for _ in range(rng.randrange(4))) + space + "]"
    else:
        members = (
            f"{space}{generated_string(rng)}{space}:{generated(rng, depth + 1)}" for _ in range(rng.randrange(4))
        )
        text = "{" + ",".join(members) + space + "}"
    return space + text + space


def generated_string(rng: random.Random) -> str:
    parts = rng.choices(
        ["a", "b", "key", "é", "😀", r"\n", r"\u0061", r"\u00e9", r"\ud83d\ude00", r"\"", "\\\\", r"\u0000"],
        k=rng.randrange(5),
    )
    return '"' + "".join(parts) + '"'


def mutated(rng: random.Random, text: bytes) -> bytes:
    """A document with some bytes taken out, put in or changed."""
    result = bytearray(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(result) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            result[at : at + rng.randrange(1, 4)] = b""
        elif kind == 1:
            result[at:at] = rng.choice([b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"e", b".", b"u"])
        elif kind == 2 and at < len(result):
            result[at] = rng.randrange(256)
        else:
            start = rng.randrange(len(result) + 1)
            result[at:at] = result[start : start + rng.randrange(1, 8)]
    return bytes(result)


def test_generated_and_mutated_documents(program: Path) -> None:
    rng = random.Random(11)
    sound = [('{"a":' + generated(rng) + ',"b":' + generated(rng) + "}").encode() for _ in range(3000)]
    assert compare(program, sound) > 1000
    damaged = [mutated(rng, rng.choice(sound)) for _ in range(9000)]
    for is_from_checkpoint in (False, True):
        assert compare(program, damaged, is_from_checkpoint=is_from_checkpoint) > 500


def test_the_comparison_sees_a_difference(program: Path) -> None:
    """Negative control: one digit, one key, one order, one type, one sign."""
    document = b'{"a": 1, "b": [0.1, "x", -0.0]}'
    (found,) = read(program, [document])
    assert same(found, expected(document))
    for other in (
        b'{"a": 1, "b": [0.10000000000000002, "x", -0.0]}',
        b'{"a": 1, "c": [0.1, "x", -0.0]}',
        b'{"b": [0.1, "x", -0.0], "a": 1}',
        b'{"a": 1.0, "b": [0.1, "x", -0.0]}',
        b'{"a": 1, "b": [0.1, "x", 0.0]}',
        b'{"a": true, "b": [0.1, "x", -0.0]}',
    ):
        assert not same(found, expected(other)), other


def test_doubles_to_the_bit(program: Path) -> None:
    rng = random.Random(12)
    literals = []
    for _ in range(2000):
        value = math.ldexp(rng.randrange(2**52, 2**53), rng.randrange(-1126, 971))
        literals += [repr(value), f"{value:.17e}", f"{value:.30f}"]
        if value > 2**60:  # the middle of two neighbors, and the numbers beside it
            middle = int(value) + int(math.ulp(value)) // 2
            literals += [f"{middle}.0", f"{middle}.{'0' * 900}1", f"{middle - 1}.{'9' * 900}", f"{middle}e0"]
    documents = [b'{"a": ' + literal.encode() + b"}" for literal in literals]
    assert compare(program, documents) == len(documents)


def test_numbers_in_a_locale_with_a_decimal_comma(program: Path) -> None:
    """The reader takes the point whatever the process's locale says; the source has no call that asks it."""
    source = (Path(__file__).parents[3] / "runtime/capi/src/bundle/json.cpp").read_text(encoding="utf-8")
    (body,) = re.findall(r"double convert_number.*?\n}\n", source, re.DOTALL)
    assert body.count("strtod(") == 1
    assert compare(program, [b'{"a": 1234567.25, "b": 12345e-3}']) == 1


def test_depth(program: Path) -> None:
    """This reader's own limit; Python's is that of its stack, and no document of a bundle comes near either."""

    def nested(depth: int) -> list[bytes]:
        lists, objects = b"[" * (depth - 1) + b"]" * (depth - 1), b'{"a":' * depth + b"1" + b"}" * depth
        return [b'{"a":' + lists + b"}", objects, b"{" + lists + b"}"]

    sound = nested(MAX_DEPTH)
    assert compare(program, sound) == 2
    assert compare(program, nested(MAX_DEPTH + 1)) == 0
    for message in read(program, nested(MAX_DEPTH + 1))[:2]:
        assert f"nested deeper than {MAX_DEPTH}" in message
    for message in read(program, [b'{"a":' + b"[" * 1_000_000, b'{"a":' * 1_000_000]):
        assert isinstance(message, Refusal)
    siblings = b'{"a":' + b"[" * 150 + b"]" * 150 + b',"b":' + b"[" * 150 + b"]" * 150 + b"}"
    assert compare(program, [siblings]) == 1


def test_halves_of_characters(program: Path) -> None:
    """A string with one isn't text: no reader could hand it on as UTF-8."""
    halves = [
        r"\ud800",
        r"\udc00",
        r"\udfff",
        r"\udbff",
        r"\ude00\ud83d",
        r"\ude00\ude00",
        r"\ud83dx",
        r"\ud83d\n",
        r"\ud83d\ud83d",
    ]
    halves += [r"\ud83d\u0041", r"a\ud83d\ud83d\ude00"]
    documents = [f'{{"a": ["{half}"]}}'.encode() for half in halves]
    documents += [f'{{"x{half}": 1}}'.encode() for half in halves]
    for is_from_checkpoint in (False, True):
        for message in read(program, documents, is_from_checkpoint=is_from_checkpoint):
            assert "half of a character" in message
        assert compare(program, documents, is_from_checkpoint=is_from_checkpoint) == 0


def test_wide_objects_take_no_quadratic_time(program: Path) -> None:
    """100,000 keys that differ in their last characters alone."""
    before = cpu_seconds()
    prefix = "k" * 40
    wide = "{" + ",".join(f'"{prefix}{i}":{i}' for i in range(100_000)) + "}"
    twice = wide[:-1] + f',"{prefix}5":0}}'
    long = '{"a":[' + ",".join(["1"] * 300_000) + "]}"
    found = read(program, [wide.encode(), twice.encode(), long.encode()])
    assert len(found[0]) == 100_000
    assert found[1] == f"document has the key '{prefix}5' twice; a key may stand once in an object"
    assert len(found[2]["a"]) == 300_000
    assert cpu_seconds() - before < 20  # 2 as it is; comparing each key with each takes 5e9 comparisons


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b'{"a": 1\n', "document is not JSON: it ends in line 2; accepted there: ',' or '}'"),
        (b'{"a": \n\n"\x01"}', r"'\x01' at byte 9, line 3; accepted there: a string without control"),
        (b'{"a": NaN}', "document holds NaN at byte 6, which is not JSON"),
        (
            b'{"a": 9223372036854775808}',
            "holds the number 9223372036854775808 at byte 6; accepted: integers of 64 bits",
        ),
        (b"[1]", "'[' at byte 0, line 1; accepted there: a JSON object"),
        (b'{"a": tru}', "'t' at byte 6, line 1; accepted there: a value"),
        (b"{} {}", "accepted there: nothing behind the object"),
    ],
)
def test_what_a_refusal_says(program: Path, document: bytes, message: str) -> None:
    (found,) = read(program, [document])
    assert message in found


def test_the_program_reads_what_python_writes(program: Path) -> None:
    text = json.dumps({"a": [None, True, 1.5, "é\n\u2028"], "b": {"c": -1}}, indent=2)
    assert compare(program, [text.encode()]) == 1
