"""`<tool_call>` JSON: examples that were published, cut anywhere, and what only looks like a call."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.server.tool_formats.hermes import Hermes
from tests.runtime.server.tool_formats import answers

# https://qwen.readthedocs.io/en/latest/framework/function_call.html
QWEN = """<tool_call>
{"name": "get_current_temperature", "arguments": {"location": "San Francisco, CA, USA"}}
</tool_call>
<tool_call>
{"name": "get_temperature_date", "arguments": {"location": "San Francisco, CA, USA", "date": "2024-10-01"}}
</tool_call>"""
# https://github.com/NousResearch/Hermes-Function-Calling
HERMES = """<tool_call>
{"arguments": {"symbol": "TSLA"}, "name": "get_stock_fundamentals"}
</tool_call>
"""


def read(text: str, cuts: tuple[int, ...] = ()) -> list[Any]:
    return answers.read(Hermes(), text, cuts)


def test_published_examples() -> None:
    place = "San Francisco, CA, USA"
    assert read(QWEN) == [
        ("get_current_temperature", {"location": place}),
        ("get_temperature_date", {"location": place, "date": "2024-10-01"}),
    ]
    assert read(HERMES) == [("get_stock_fundamentals", {"symbol": "TSLA"})]


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "é </tool_cal> \\"q\\""}}\n</tool_call>'
SHORT = '<tool_call>{"name": "f", "arguments": %s}</tool_call>'
OTHER = 'a <tool_call>{"name": "g", "arguments": {}}</tool_call>'
F = ("f", {"x": 'é </tool_cal> "q"'})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("Just words.", ["Just words."]),
        ("Ends in blanks \n", ["Ends in blanks \n"]),
        ("a < b, <tool, <tool_call", ["a < b, <tool, <tool_call"]),
        ("I'll look.\n\n" + CALL, ["I'll look.", F]),
        (CALL + "\nDone.", [F, "\nDone."]),
        (CALL + CALL, [F, F]),
        (CALL.removesuffix("</tool_call>"), [F]),
        (CALL + "  \n", [F]),
        ('<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        (SHORT % '{"x": 1, "x": 2}', [("f", {"x": 2})]),  # which a schema can't forbid
        (SHORT % f'{{"x": {10**30}}}', [("f", {"x": 10**30})]),
        (SHORT % '{"x": NaN}', [SHORT % '{"x": NaN}']),
        (SHORT % '{"x": 1e999}', [SHORT % '{"x": 1e999}']),
        (SHORT % '{"x": "\\ud800"}', [SHORT % '{"x": "\\ud800"}']),
        (SHORT % ("[" * 2_000), [SHORT % ("[" * 2_000)]),
        # What isn't a call of a function that was offered is text, as it was written.
        (OTHER, [OTHER]),
        ("<tool_call>not json</tool_call> b", ["<tool_call>not json</tool_call> b"]),
        (OTHER.replace('"g"', '"f"').replace("{}", '"x"'), [OTHER.replace('"g"', '"f"').replace("{}", '"x"')]),
        ('<tool_call>{"name": ["f"]}</tool_call>', ['<tool_call>{"name": ["f"]}</tool_call>']),
        ('<tool_call>{"name": "f", "arguments": {"x": ', ['<tool_call>{"name": "f", "arguments": {"x": ']),
        ("<tool_call>", ["<tool_call>"]),
        ("</tool_call>", ["</tool_call>"]),
    ],
)  # fmt: skip
def test_what_is_a_call(text: str, found: list[Any]) -> None:
    assert read(text) == found
    assert read(text, tuple(range(len(text)))) == found


@given(
    text=st.lists(
        st.sampled_from(
            [CALL, "<tool_call>", "</tool_call>", "\n", " ", "words", "<", "tool_call", '{"name": "f"}', "é"]
        ),
        max_size=8,
    ).map("".join),
    cuts=st.lists(st.integers(0, 300), max_size=6).map(tuple),
)
def test_how_a_text_is_cut_changes_nothing(text: str, cuts: tuple[int, ...]) -> None:
    assert read(text, cuts) == read(text)


@given(text=st.text(alphabet="<tool_cal/>{} \nx", max_size=60))
def test_without_a_call_no_character_is_lost(text: str) -> None:
    assert "".join(read(text)) == text


def test_which_templates_teach_it() -> None:
    assert Hermes().fits(("x", 'write <tool_call>\n{"name": ...')) and not Hermes().fits(("x", "tools"))
