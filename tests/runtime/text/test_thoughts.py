"""Which models have thoughts, what a prompt says of them, and which tokens of an output they are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.runtime.text.chat_template import ChatTemplate
from qwen_aot.runtime.text.detokenizer import byte_of_character
from qwen_aot.runtime.text.thoughts import Part, ThoughtReader, ThoughtTokens
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.chat_templates import PUBLISHED, QWEN3, QWEN3_WHOLE
from tests.runtime.texts import byte_tokenizer

OPENING, CLOSING = 257, 258
TOKENS = ThoughtTokens(OPENING, CLOSING)


def tokenizer_with(*tokens: str, special: bool = False) -> Tokenizer:
    tokenizer = byte_tokenizer(300)
    tokenizer.backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens])
    return Tokenizer(tokenizer.backend, {}, vocab_size=300)


TOKENIZER = tokenizer_with("<think>", "</think>")


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


@pytest.mark.parametrize("special", [False, True])
def test_a_template_and_a_tokenizer_that_know_the_marks(special: bool) -> None:
    tokenizer = tokenizer_with("<think>", "</think>", special=special)
    for template in (QWEN3, QWEN3_WHOLE, "{{ messages[0].content.split('</think>')[-1] }}"):
        assert ThoughtTokens.of(tokenizer, ChatTemplate(template)) == TOKENS


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"qwen3"}))
def test_a_template_that_knows_nothing_of_them(name: str) -> None:
    assert ThoughtTokens.of(TOKENIZER, ChatTemplate(PUBLISHED[name])) is None


@pytest.mark.parametrize("tokens", [(), ("<think>",), ("</think>",), ("<thinking>", "</thinking>")])
def test_a_tokenizer_that_spells_them(tokens: tuple[str, ...]) -> None:
    assert ThoughtTokens.of(tokenizer_with(*tokens), ChatTemplate(QWEN3)) is None


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("[assistant]<think>\n", True),
        ("[assistant]<think>", True),
        ("<think>a</think>b<think>\n \n", True),
        ("[assistant]", False),
        ("[assistant]<think>\n\n</think>\n\n", False),
        ("<think>[assistant]", False),
        ("<think>\nI", False),
        ("", False),
    ],
)
def test_what_a_prompt_begins(prompt: str, is_open: bool) -> None:
    assert TOKENS.is_open(ids(prompt), TOKENIZER) == is_open
    assert ThoughtReader(TOKENS, ids(prompt), TOKENIZER).is_in_thought == is_open
    closed = ids(prompt.rstrip() + "\n\n</think>\n\n") if is_open else ids(prompt)
    assert TOKENS.closed(ids(prompt), TOKENIZER) == closed


@pytest.mark.parametrize("behind", ["", "\n", "\n\n", "\n\n\n"])
def test_the_thought_that_is_closed_is_what_a_template_writes(behind: str) -> None:
    """With a tokenizer that has two line ends as one token, as Qwen's: two tokens of one each are nothing it reads."""
    backend = RustTokenizer(
        models.BPE(vocab=dict(byte_of_character()) | {"\u010a\u010a": 256}, merges=[("\u010a", "\u010a")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    tokenizer = Tokenizer(backend, {}, vocab_size=300)
    written = [*b"[a]", OPENING, 256, CLOSING, 256]
    assert tokenizer.encode("[a]<think>\n\n</think>\n\n") == written
    assert TOKENS.closed(tokenizer.encode(f"[a]<think>{behind}"), tokenizer) == written


def test_marks_that_a_user_spells_are_none() -> None:
    spelled = TOKENIZER.encode("[assistant]", add_special_tokens=False) + list(b"<think>\n")
    assert not TOKENS.is_open(spelled, TOKENIZER)


def parts(prompt: str, output: list[int], *, tokens: ThoughtTokens | None = TOKENS) -> list[tuple[Part, str]]:
    """The texts of an output by their parts, neighbours of one part joined."""
    reader = ThoughtReader(tokens, ids(prompt), TOKENIZER)
    found: list[tuple[Part, str]] = []
    texts = {OPENING: "<think>", CLOSING: "</think>"}
    given = [reader.push(token_id, texts.get(token_id) or chr(token_id)) for token_id in output]
    for text, part in [*given, reader.flush("")]:
        if found and found[-1][0] is part:
            found[-1] = (part, found[-1][1] + text)
        elif text:
            found.append((part, text))
    return found


MARK_OPEN, MARK_CLOSE = (Part.MARK, "<think>"), (Part.MARK, "</think>")


@pytest.mark.parametrize(
    ("prompt", "output", "found"),
    [
        ("[a]", "<think>ab</think>cd", [MARK_OPEN, (Part.THOUGHT, "ab"), MARK_CLOSE, (Part.ANSWER, "cd")]),
        ("[a]<think>\n", "ab</think>cd", [(Part.THOUGHT, "ab"), MARK_CLOSE, (Part.ANSWER, "cd")]),
        ("[a]", "\n <think>ab", [(Part.MARK, "\n <think>"), (Part.THOUGHT, "ab")]),
        ("[a]", "\n ", [(Part.ANSWER, "\n ")]),
        ("[a]", "\n x<think>y</think>", [(Part.ANSWER, "\n x<think>y</think>")]),  # it doesn't begin with one
        ("[a]", "x</think>", [(Part.ANSWER, "x</think>")]),
        ("[a]<think></think>", "<think>a</think>b", [(Part.ANSWER, "<think>a</think>b")]),  # none is wanted
        ("[a]<think>", "a<think>b</think></think>", [
            (Part.THOUGHT, "a<think>b"), MARK_CLOSE, (Part.ANSWER, "</think>"),
        ]),
        ("[a]<think>", "</think>b", [MARK_CLOSE, (Part.ANSWER, "b")]),
        ("[a]<think>", "", []),
    ],
)  # fmt: skip
def test_what_tokens_belong_to(prompt: str, output: str, found: list[tuple[Part, str]]) -> None:
    assert parts(prompt, ids(output)) == found


def test_half_a_character_is_no_whitespace() -> None:
    reader = ThoughtReader(TOKENS, ids("[a]"), TOKENIZER)
    assert reader.push(0xC3, "") == ("", Part.ANSWER) and reader.may_open is None
    assert reader.push(OPENING, "\ufffd<think>") == ("\ufffd<think>", Part.ANSWER)


def test_marks_that_a_model_spells_are_text() -> None:
    assert parts("[a]<think>", list(b"a</think>b")) == [(Part.THOUGHT, "a</think>b")]


@given(
    prompt=st.sampled_from(["[a]", "[a]<think>", "[a]<think></think>"]),
    output=st.lists(st.sampled_from([OPENING, CLOSING, *b" \nab"]), max_size=12),
)
def test_no_text_is_lost_and_parts_are_in_order(prompt: str, output: list[int]) -> None:
    found = parts(prompt, output)
    assert "".join(text for _, text in found) == TOKENIZER.backend.decode(output)
    orders = itertools.product(([], [Part.MARK]), ([], [Part.THOUGHT]), ([], [Part.MARK]), ([], [Part.ANSWER]))
    assert [part for part, _ in found] in [[*itertools.chain(*order)] for order in orders]
    assert parts(prompt, output, tokens=None) in ([], [(Part.ANSWER, TOKENIZER.backend.decode(output))])
