"""What tokens append to a text: their bytes joined are the text that the whole sequence decodes to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from qwen_aot.runtime.text.token_bytes import TokenBytes
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.runtime.texts import byte_tokenizer, golden_tokenizer, sentencepiece_tokenizer

TOKENIZERS = {"bytes": byte_tokenizer(), "golden": golden_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(data=st.data())
def test_bytes_joined_are_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.backend.get_vocab_size() - 1), max_size=8))
    known = TokenBytes(tokenizer)
    joined = b"".join(map(known.of, ids))
    try:
        text = joined.decode()
    except UnicodeDecodeError:
        return  # half characters, which each decoder writes in its own way
    # A decoder may drop a space at the very beginning.
    assert tokenizer.decode(ids) in (text, text.removeprefix(" "))


def test_tokens_without_a_text_have_none() -> None:
    known = TokenBytes(byte_tokenizer())
    assert known.of(256) == b"" and known.of(299) == b""  # <|end|>, and an id of the model's padding
    assert known.of(0xE4) == b"\xe4"


def test_spaces_and_single_bytes_of_sentencepiece() -> None:
    tokenizer = sentencepiece_tokenizer()
    known = TokenBytes(tokenizer)
    vocabulary = tokenizer.backend.get_vocab()
    assert known.of(vocabulary["▁Hello"]) == b" Hello" and known.of(vocabulary["<0xE4>"]) == b"\xe4"


def test_an_added_token_that_is_no_control_token_is_its_spelling() -> None:
    """As `<tool_call>` of Qwen2.5: one token, and text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer = Tokenizer(tokenizer.backend, {}, vocab_size=300)
    assert TokenBytes(tokenizer).of(257) == b"<tool_call>"


def test_a_piece_that_only_looks_like_a_byte() -> None:
    """Without a decoder that makes bytes of such pieces it is text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_tokens([AddedToken("<0x41>", special=False)])
    assert TokenBytes(Tokenizer(tokenizer.backend, {}, vocab_size=300)).of(257) == b"<0x41>"
