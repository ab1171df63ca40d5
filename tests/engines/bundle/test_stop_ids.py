"""Where answers end: everything that names an end is heeded, and nothing that any text may hold."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer

from qwen_aot.engines.bundle.stop_ids import gather
from qwen_aot.exporter.checkpoint.bpe import byte_level_bpe

TEXT, END, START, TURN, TAG, CLOSE = 2, 3, 4, 5, 6, 7


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """`x`, a line end and tokens whose names no list of known ends has; </answer> is not special."""
    added = {
        END: AddedToken("<|endoftext|>", special=True, normalized=False),
        START: AddedToken("<|start|>", special=True, normalized=False),
        TURN: AddedToken("<|turn_end|>", special=True, normalized=False),
        TAG: AddedToken("</answer>", special=False, normalized=False),
        CLOSE: AddedToken("<close>", special=True, normalized=False),
    }
    return byte_level_bpe({"x": 0, "Ċ": 1, "Ġ": TEXT}, [], pre="qwen2", added=added)


def ids(
    tokenizer: Tokenizer, *configured: int, tails: tuple[str, ...] = (), ends: tuple[str, ...] = ()
) -> tuple[int, ...]:
    return gather(configured, vocab_size=8, tokenizer=tokenizer, end_tokens=ends, tails=tails).ids


def test_without_a_tokenizer_the_configuration_says() -> None:
    assert gather([5, 3, 5, -1], vocab_size=8, tokenizer=None).ids == (5, 3)
    found = gather([5, 8], vocab_size=8, tokenizer=None)
    assert found.ids == (5,)
    assert found.warnings == ("the configuration names 8 as an end of text, beyond the vocabulary of 8: left out",)


def test_the_template_ends_turns_with_another_token_than_the_configuration(tokenizer: Tokenizer) -> None:
    assert ids(tokenizer, END, tails=("<|turn_end|>\n", "<|turn_end|>\n<|start|>x")) == (END, TURN)


def test_known_ends_count_where_they_are_special(tokenizer: Tokenizer) -> None:
    assert ids(tokenizer) == (END,)
    plain = byte_level_bpe({"x": 0}, [], pre="qwen2", added={1: AddedToken("<|endoftext|>", special=False)})
    assert ids(plain) == ()


def test_the_tokenizers_end(tokenizer: Tokenizer) -> None:
    assert ids(tokenizer, ends=("<|turn_end|>", "<close>")) == (TURN, CLOSE, END)
    assert ids(tokenizer, END, ends=("x",)) == (END, 0)  # no token of its own, and named


@pytest.mark.parametrize(
    ("tail", "mark"),
    [
        ("<|turn_end|>", TURN),
        (" \n<|turn_end|>x", TURN),
        ("</answer>\n<|turn_end|>", TURN),
        ("<close><|turn_end|>", CLOSE),
        ("</answer>", TAG),
        ("</answer>x<|turn_end|>", TAG),
        ("x<|turn_end|>", None),
        ("\n", None),
        ("", None),
    ],
)
def test_the_mark_behind_an_answer(tail: str, mark: int | None, tokenizer: Tokenizer) -> None:
    found = gather([END], vocab_size=8, tokenizer=tokenizer, tails=(tail,))
    assert found.ids == ((END,) if mark is None else (END, mark))
    assert bool(found.warnings) == (mark is None)


def test_a_template_without_a_mark_says_where_answers_end(tokenizer: Tokenizer) -> None:
    (warning,) = gather([END], vocab_size=8, tokenizer=tokenizer, tails=("", "\nx")).warnings
    assert "ends an answer with '\\nx', which holds no token of its own: answers end at 3;" in warning


def test_the_opening_of_the_next_turn_ends_an_answer_that_nothing_else_does(tokenizer: Tokenizer) -> None:
    assert ids(tokenizer, END, tails=("", "<|start|>x")) == (END, START)


def test_white_space_is_no_end_by_the_tokenizers_name_and_one_with_a_warning_by_the_configuration(
    tokenizer: Tokenizer,
) -> None:
    found = gather([1], vocab_size=8, tokenizer=tokenizer, end_tokens=("Ċ",))
    assert found.ids == (1, END)
    assert found.warnings == (
        "the configuration names 1 as an end of text, which is white space ('\\n'): answers end there",
        "the tokenizer's eos_token is 'Ċ', which any text may hold: left out",
    )


def test_an_end_that_the_vocabulary_lacks(tokenizer: Tokenizer) -> None:
    found = gather([END], vocab_size=8, tokenizer=tokenizer, end_tokens=("<|gone|>",))
    assert found.ids == (END,)
    assert "eos_token is '<|gone|>', which its vocabulary lacks" in found.warnings[0]


def test_ids_beyond_the_model_are_left_out(tokenizer: Tokenizer) -> None:
    found = gather([], vocab_size=END, tokenizer=tokenizer, end_tokens=("<close>",), tails=("<|turn_end|>",))
    assert found.ids == ()
    assert len(found.warnings) == 2
