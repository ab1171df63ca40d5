"""Messages of the C library are text, whatever their length."""

from __future__ import annotations

import pytest

from tests.runtime.capi.native import Native, ask

CAPACITY = 1536  # bytes of a message, with its NUL (runtime/capi/src/base/status.h)


@pytest.mark.parametrize("character", ["x", "é", "你", "😀"])
def test_a_message_is_cut_between_characters(native: Native, character: str) -> None:
    """As late as it can be, wherever the end falls in a character."""
    size = len(character.encode())
    program = native.program("status")
    texts = ["a" * shift + character * 2000 for shift in range(size)] + ["a" * shift + character for shift in range(3)]
    for text, answer in zip(texts, ask(program, [{"text": text} for text in texts]), strict=True):
        kept = answer["message"]
        assert text.startswith(kept)
        whole = len(text.encode())
        assert len(kept.encode()) == whole if whole < CAPACITY else CAPACITY - 1 - size < len(kept.encode()) < CAPACITY
