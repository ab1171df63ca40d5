"""Incremental detokenization: pieces are whole characters and join to the whole decoded."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.text.detokenizer import make_detokenizer
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.runtime.texts import GOLDEN, byte_tokenizer, golden_tokenizer, sentencepiece_tokenizer

CASES = json.loads((GOLDEN / "detokenization.json").read_text(encoding="utf-8"))["cases"]
GOLDEN_TOKENIZER = golden_tokenizer()
BYTES = byte_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token gives, and the flush."""
    detokenizer = make_detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_golden(case: dict[str, object]) -> None:
    assert isinstance(case["ids"], list)
    assert "".join(pieces(GOLDEN_TOKENIZER, case["ids"])) == case["text"]


def test_a_character_comes_out_with_its_last_byte() -> None:
    assert pieces(BYTES, list("a😀é".encode())) == ["a", "", "", "", "😀", "", "é", ""]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    assert pieces(BYTES, list("😀".encode())[:3]) == ["", "", "", "�"]


@pytest.mark.parametrize("tokenizer", [BYTES, SENTENCEPIECE], ids=["bytes", "sentencepiece"])
def test_behind_a_character_that_is_cut_the_text_goes_on(tokenizer: Tokenizer) -> None:
    is_bytes = tokenizer is BYTES
    vocabulary = tokenizer.backend.get_vocab()
    half, before, behind = (
        (0xC3, list(b"Hello"), list(b" wor"))
        if is_bytes
        else (vocabulary["<0xC3>"], [vocabulary["▁Hello"]], [vocabulary["▁wor"]])
    )
    detokenizer = make_detokenizer(tokenizer)
    assert [detokenizer.push(token_id) for token_id in [*before, half]][-1] == ""
    assert detokenizer.flush() == "�" and detokenizer.flush() == ""
    assert "".join(map(detokenizer.push, behind)) == " wor"  # with its space, which only a text's first word loses


def test_special_tokens_and_padding_ids_have_no_text() -> None:
    assert pieces(BYTES, [97, 256, 98, 299]) == ["a", "", "b", "", ""]


@given(st.lists(st.one_of(st.integers(0, 256), st.integers(0xC0, 0xFF)), max_size=40))
def test_any_bytes_join_to_the_whole_decoded(ids: list[int]) -> None:
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids)


@given(st.lists(st.integers(0, GOLDEN_TOKENIZER.backend.get_vocab_size() - 1), max_size=40))
def test_any_ids_join_to_the_whole_decoded(ids: list[int]) -> None:
    assert "".join(pieces(GOLDEN_TOKENIZER, ids)) == GOLDEN_TOKENIZER.decode(ids)


@given(st.text(max_size=30))
def test_text_streams_back_and_every_piece_is_whole(text: str) -> None:
    for tokenizer in (BYTES, GOLDEN_TOKENIZER):
        streamed = pieces(tokenizer, tokenizer.backend.encode(text).ids)
        assert "".join(streamed) == tokenizer.decode(tokenizer.backend.encode(text).ids)
        assert "�" not in "".join(streamed) or "�" in text


@given(st.lists(st.sampled_from(["▁Hello", "▁wor", "ld", "a", "é", ",", "你", "▁", "😀", "ü", "</s>"]), max_size=20))
def test_sentencepiece_text_joins_to_the_whole_decoded(parts: list[str]) -> None:
    backend = SENTENCEPIECE.backend
    ids: list[int] = []
    for part in parts:
        token_id = backend.token_to_id(part)
        by_byte = [backend.token_to_id(f"<0x{byte:02X}>") for byte in part.encode()]
        ids += by_byte if token_id is None else [token_id]
    streamed = pieces(SENTENCEPIECE, ids)
    assert "".join(streamed) == SENTENCEPIECE.decode(ids)
    assert "�" not in "".join(streamed)


def test_sentencepiece_holds_a_character_made_of_bytes() -> None:
    backend = SENTENCEPIECE.backend
    ids = [backend.token_to_id("▁Hello"), *(backend.token_to_id(f"<0x{b:02X}>") for b in "😀".encode())]
    assert pieces(SENTENCEPIECE, ids) == ["Hello", "", "", "", "😀", ""]
    assert pieces(SENTENCEPIECE, ids[:3]) == ["Hello", "", "", "��"]
