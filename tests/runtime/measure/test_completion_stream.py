"""The stream of a completion: the same however its bytes are cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.measure.completion_stream import MAX_MESSAGE, CompletionStream, StreamError
from qwen_aot.runtime.measure.outcome import FailureKind

TEXTS = ("Grüße", " ", "", "\n\ndata: [DONE]\n\n")


def stream(newline: str = "\n") -> bytes:
    """Four pieces, one of them without text, a comment, a field that isn't data, and the counts."""
    chunks = [{"choices": [{"index": 0, "text": said, "finish_reason": None}]} for said in TEXTS]
    chunks[-1]["choices"][0]["finish_reason"] = "length"  # type: ignore[assignment]
    lines = [": a comment", "", "event: message"]
    for chunk in chunks:
        lines += [f"data: {json.dumps(chunk, ensure_ascii=False)}", ""]
    lines += ['data:{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9}}', "", "data: [DONE]", "", ""]
    return newline.join(lines).encode()


@given(st.lists(st.integers(0, len(stream("\r\n"))), max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_however_it_is_cut(cuts: list[int], newline: str) -> None:
    content = stream(newline)
    read = CompletionStream(9)
    places = sorted({0, *(min(cut, len(content)) for cut in cuts), len(content)})
    for number, (begin, end) in enumerate(itertools.pairwise(places)):
        read.feed(content[begin:end], float(number))
    assert read.is_done and len(read.pieces) == 3 and read.pieces == sorted(read.pieces)
    assert read.counts() == (7, 9)


def test_a_piece_has_the_time_at_which_its_line_was_whole() -> None:
    read = CompletionStream(4)
    line = b'data: {"choices": [{"text": "a"}]}\n'
    read.feed(line[:-1], 1.0)
    assert read.pieces == []
    read.feed(line[-1:] + line, 2.0)
    assert read.pieces == [2.0, 2.0]


def test_the_last_usage_counts() -> None:
    """Some servers say it with each piece."""
    read = CompletionStream(4)
    for number in (1, 2):
        usage = {"prompt_tokens": 3, "completion_tokens": number}
        read.feed(f"data: {json.dumps({'choices': [{'text': 'a'}], 'usage': usage})}\n".encode(), 1.0)
    assert read.counts() == (3, 2)


def test_nothing_is_read_behind_the_end() -> None:
    read = CompletionStream(4)
    read.feed(b"data: [DONE]\n\ndata: {oops\n\n", 1.0)
    assert read.is_done and read.pieces == []


@given(st.binary(max_size=300))
def test_other_bytes_are_a_fault_or_nothing(content: bytes) -> None:
    read = CompletionStream(4)
    try:
        read.feed(b"data:" + content + b"\n", 1.0)
        read.counts()
    except StreamError as error:
        assert isinstance(error.kind, FailureKind) and len(str(error)) <= MAX_MESSAGE


def test_a_long_message_is_cut() -> None:
    with pytest.raises(StreamError) as raised:
        CompletionStream(4).feed(f'data: {{"error": "{"x" * 1000}"}}\n'.encode(), 1.0)
    assert str(raised.value) == "x" * MAX_MESSAGE
