"""Outputs that are held to a constraint: every one is a sentence of its grammar, whatever the logits and settings."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen_aot.errors import ConstraintError
from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from qwen_aot.runtime.generation.request import Completion, FinishReason, Request, TokenEvent
from qwen_aot.runtime.generation.sampling import log_probabilities
from qwen_aot.runtime.generation.stopping import StopMatcher
from qwen_aot.runtime.text.thoughts import ThoughtTokens
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.runtime.fakes import FakeEngine
from tests.runtime.server.servers import make_tokenizer
from tests.runtime.texts import byte_tokenizer
from tests.runtime.toys import make_manifest

V = 12
END = 11


class Words:
    """Held to a finite set of words over 0 ... 10: the reference is membership in that set."""

    def __init__(self, words: Iterable[tuple[int, ...]], vocab_size: int = V) -> None:
        self.words = frozenset(words)
        self.vocab_size = vocab_size
        self.starts = 0

    def start(self) -> _Word:
        self.starts += 1
        return _Word(self)


class _Word:
    def __init__(self, source: Words) -> None:
        self.source = source
        self.so_far: tuple[int, ...] = ()

    def _next(self) -> set[int]:
        length = len(self.so_far)
        return {word[length] for word in self.source.words if len(word) > length and word[:length] == self.so_far}

    def mask(self) -> NDArray[np.float32]:
        found = np.full(self.source.vocab_size, -np.inf, np.float32)
        found[list(self._next())] = 0
        return found

    def accept(self, token_id: int) -> None:
        if token_id not in self._next():
            raise ConstraintError(f"{token_id} isn't allowed")
        self.so_far += (token_id,)

    @property
    def may_end(self) -> bool:
        return self.so_far in self.source.words

    @property
    def is_finished(self) -> bool:
        return not self._next()


class RandomEngine(FakeEngine):
    """Logits are random numbers that a row's tokens decide."""

    def _logits(self, row: int) -> NDArray[np.float32]:
        seed = functools.reduce(lambda so_far, token_id: (31 * so_far + token_id + 7) % 2**31, self.rows[row], 0)
        size = self.manifest.model.vocab_size
        return np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 5


def run(
    constraint: Any,
    *,
    tokenizer: Tokenizer | None = None,
    prompt: tuple[int, ...] = (1, 2),
    rows: int = 2,
    engine: Callable[..., FakeEngine] = RandomEngine,
    vocab_size: int = V,
    eos: tuple[int, ...] = (END,),
    thoughts: ThoughtTokens | None = None,
    **options: Any,
) -> tuple[list[Completion], list[TokenEvent]]:
    manifest = make_manifest(max_batch=rows, max_context=100, vocab_size=vocab_size, eos_token_ids=eos)
    batch = Batch(engine(manifest), tokenizer, GenerationDefaults(eos_token_ids=eos))
    config = GenerationConfig(**{"max_new_tokens": 30} | options)
    batch.add(Request(prompt, config, constraint=constraint, thoughts=thoughts))
    events: list[Any] = []
    while not batch.is_idle:
        events += batch.step()
    completions = sorted((e for e in events if isinstance(e, Completion)), key=lambda each: each.choice)
    return completions, [e for e in events if isinstance(e, TokenEvent)]


words = st.lists(st.integers(0, 10), max_size=6).map(tuple)
knobs = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 50.0]),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([1.0, 0.5, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.9]),
        "repetition_penalty": st.sampled_from([1.0, 3.0]),
        "presence_penalty": st.sampled_from([0.0, -2.0, 2.0]),
        "frequency_penalty": st.sampled_from([0.0, 2.0]),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, 100.0]), max_size=4),
        "min_new_tokens": st.integers(0, 30),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, V - 1), max_size=1).map(tuple),
        "logprobs": st.just(2),
    },
)


@given(
    language=st.sets(words, min_size=1, max_size=8),
    n=st.sampled_from([1, 1, 3]),
    options=knobs,
    seed=st.integers(0, 99),
)
def test_every_output_is_of_the_language(
    language: set[tuple[int, ...]], n: int, options: dict[str, Any], seed: int
) -> None:
    source = Words(language)
    completions, events = run(source, prompt=(seed % 11,), n=n, seed=seed, **options)
    assert len(completions) == source.starts == n
    stop_ids = set(options.get("stop_token_ids", ()))
    for completion in completions:
        said = completion.token_ids
        if completion.finish_reason is FinishReason.ERROR:
            # A token that ends the request stands for its end: words with it inside may have no way on.
            assert isinstance(completion.error, ConstraintError) and stop_ids
            assert any(
                word[: len(said)] == said and word[len(said)] in stop_ids for word in language if len(word) > len(said)
            )
            continue
        assert completion.finish_reason is FinishReason.STOP
        assert said in language and stop_ids.isdisjoint(said)
        assert [event.token_id for event in events if event.choice == completion.choice] == list(said)


OPENING, CLOSING = 257, 258


@given(
    language=st.sets(words, min_size=1, max_size=8),
    prompt=st.sampled_from([(1, 2), (1, OPENING), (1, OPENING, CLOSING)]),
    opens=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_thought_before_it_may_be_anything(
    language: set[tuple[int, ...]], prompt: tuple[int, ...], opens: bool, seed: int
) -> None:
    bias = {OPENING: 100.0 if opens else -100.0, CLOSING: 17.0, 256: 17.0}
    (completion,), events = run(
        Words(language, 300), prompt=(seed, *prompt), tokenizer=make_tokenizer(), vocab_size=300, eos=(256,),
        thoughts=ThoughtTokens(OPENING, CLOSING), logit_bias=bias, temperature=1.0, seed=seed,
    )  # fmt: skip
    said = list(completion.token_ids)
    blank = next((n for n, token_id in enumerate(said) if token_id not in (9, 10, 11)), len(said))  # \t, \n, \v
    thought: list[int] = []
    if prompt[-1] == OPENING:
        blank, thought = 0, said[: said.index(CLOSING) + 1 if CLOSING in said else len(said)]
    elif prompt[-1] == 2 and said[blank : blank + 1] == [OPENING]:
        thought = said[blank : said.index(CLOSING) + 1 if CLOSING in said else len(said)]
    assert not opens or prompt[-1] != 2 or OPENING in thought
    answer = tuple(said[:blank] + said[blank + len(thought) :])
    if CLOSING in thought or not thought:
        assert completion.finish_reason is FinishReason.STOP and answer in language
    else:  # it doesn't end in the thought
        assert completion.finish_reason is FinishReason.LENGTH
    assert completion.thought_tokens == (blank + len(thought) if thought else 0)
    assert [event.token_id for event in events] == said
    assert "".join(event.text for event in events) + completion.last_text == completion.text


class SayingEngine(FakeEngine):
    """Its logits are always the same: those of `LIKES`, 0 for every other token."""

    LIKES: ClassVar[dict[int, float]] = {}

    def _logits(self, row: int) -> NDArray[np.float32]:
        found = np.zeros(self.manifest.model.vocab_size, np.float32)
        found[list(self.LIKES)] = list(self.LIKES.values())
        return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("likes", "options", "opens"),
    [
        ({65: 40.0, OPENING: 30.0}, {}, False),  # it would rather say A, so it doesn't think
        ({65: 40.0, OPENING: 50.0}, {}, True),
        ({65: 40.0, OPENING: 30.0}, {"suppress_tokens": (65,)}, True),
        ({65: 40.0, OPENING: 50.0}, {"suppress_tokens": (OPENING,)}, False),
    ],
)
def test_a_mask_makes_no_thought_likelier(
    likes: dict[int, float], options: dict[str, Any], opens: bool, temperature: float
) -> None:
    """A mark that is far behind what the model would say is far before what the constraint leaves of that."""
    engine = type("Engine", (SayingEngine,), {"LIKES": likes})
    (completion,), _ = run(
        Words({(3, 4)}, 300), engine=engine, tokenizer=make_tokenizer(), vocab_size=300, eos=(256,),
        thoughts=ThoughtTokens(OPENING, CLOSING), max_new_tokens=9, temperature=temperature, seed=1, **options,
    )  # fmt: skip
    assert (completion.token_ids[0] == OPENING) == opens
    if not opens:
        assert (completion.token_ids, completion.finish_reason) == ((3, 4), FinishReason.STOP)


def test_without_a_constraint_it_would_not_be() -> None:
    """The negative control: what holds above isn't the engine's doing."""
    (free,), _ = run(None, max_new_tokens=6)
    (held,), _ = run(Words({(3, 4, 5)}), max_new_tokens=6)
    assert free.token_ids != (3, 4, 5) == held.token_ids


@given(firsts=st.sets(st.integers(0, 10), min_size=1), prompt=st.integers(0, 10))
def test_of_several_ways_the_likeliest_is_taken(firsts: set[int], prompt: int) -> None:
    (completion,), _ = run(Words({(first,) for first in firsts}), prompt=(prompt,))
    logits = RandomEngine(make_manifest(vocab_size=V)).prefill(0, np.array([prompt]))
    assert completion.token_ids == (max(firsts, key=lambda first: logits[first]),)


def test_logprobs_are_of_the_raw_logits() -> None:
    (completion,), _ = run(Words({(3,)}), logprobs=2, prompt=(5,))
    engine = RandomEngine(make_manifest(vocab_size=V))
    logits = engine.prefill(0, np.array([5]))
    assert completion.logprobs == (log_probabilities(logits, 3, 2),)
    assert 3 not in [token_id for token_id, _ in completion.logprobs[0].top]  # else it shows nothing


def test_the_end_comes_with_the_last_token_and_no_step_is_spent_on_it() -> None:
    engines: list[RandomEngine] = []

    def engine(manifest: Any) -> RandomEngine:
        engines.append(RandomEngine(manifest))
        return engines[0]

    (completion,), _ = run(Words({(3, 4)}), engine=engine, eos=())
    assert completion.finish_reason is FinishReason.STOP and completion.token_ids == (3, 4)
    assert len(engines[0].decodes) == 1  # of 3; 4 is never fed


@pytest.mark.parametrize(
    ("language", "options", "said", "reason"),
    [
        ({()}, {}, (), FinishReason.STOP),
        ({(3, 4, 5)}, {"max_new_tokens": 2}, (3, 4), FinishReason.LENGTH),
        ({(3, 4)}, {"max_new_tokens": 2}, (3, 4), FinishReason.STOP),
        ({(3,), (3, 4)}, {"max_new_tokens": 1}, (3,), FinishReason.LENGTH),  # more could come
        ({(3,), (3, 4)}, {"logit_bias": {END: 100}}, (3,), FinishReason.STOP),
        ({(3,), (3, 4)}, {"logit_bias": {END: 100}, "min_new_tokens": 2}, (3, 4), FinishReason.STOP),
        ({(3,), (3, 4)}, {"logit_bias": {END: 100}, "ignore_eos": True}, (3, 4), FinishReason.STOP),
        ({(3,)}, {"min_new_tokens": 9}, (3,), FinishReason.STOP),  # nothing else can come
        ({(3,), (3, 4)}, {"suppress_tokens": (4, END)}, (3,), FinishReason.STOP),
        ({(3,), (4,)}, {"suppress_tokens": (4,), "logit_bias": {4: 100}}, (3,), FinishReason.STOP),
    ],
)  # fmt: skip
def test_ends(
    language: set[tuple[int, ...]], options: dict[str, Any], said: tuple[int, ...], reason: FinishReason
) -> None:
    (completion,), _ = run(Words(language), **options)
    assert (completion.token_ids, completion.finish_reason) == (said, reason)


def test_a_constraint_that_leaves_nothing_ends_its_choice_alone() -> None:
    completions, events = run(Words({(3,)}), suppress_tokens=(3,), n=3)
    assert [each.finish_reason for each in completions] == [FinishReason.ERROR] * 3 and not events
    assert "suppress" in str(completions[0].error)


class Failing(Words):
    """Fails where it is told to."""

    def __init__(self, where: str) -> None:
        super().__init__({(3, 4, 5)})
        self.where = where

    def start(self) -> _Word:
        if self.where == "start":
            raise ConstraintError("start")
        word = super().start()
        if self.where != "none":
            original = getattr(word, self.where)

            def fail(*given: Any) -> Any:
                if len(word.so_far) == 1 and self.starts == 1:
                    raise ConstraintError(self.where)
                return original(*given)

            setattr(word, self.where, fail)
        return word


@pytest.mark.parametrize("where", ["start", "mask", "accept"])
def test_a_failure_ends_one_choice_and_the_others_go_on(where: str) -> None:
    completions, _ = run(Failing(where), n=3, rows=1)
    failed, *others = completions
    assert failed.finish_reason is FinishReason.ERROR and str(failed.error) == where
    if where != "start":
        assert failed.token_ids == (3,)
        assert [each.token_ids for each in others] == [(3, 4, 5)] * 2


def test_another_request_beside_it_is_what_it_is_alone() -> None:
    manifest = make_manifest(max_batch=2, max_context=100, vocab_size=V, eos_token_ids=())
    batch = Batch(RandomEngine(manifest), None, GenerationDefaults(eos_token_ids=()))
    batch.add(Request((1, 2), GenerationConfig(max_new_tokens=8), constraint=Words({(3, 4, 5, 6, 7, 8)})))
    batch.add(Request((5,), GenerationConfig(max_new_tokens=8)))
    completions: dict[int, Completion] = {}
    while not batch.is_idle:
        completions |= {each.index: each for each in batch.step() if isinstance(each, Completion)}
    (alone,), _ = run(None, prompt=(5,), max_new_tokens=8, eos=())
    assert completions[0].token_ids == (3, 4, 5, 6, 7, 8) and completions[1].token_ids == alone.token_ids


def text_words(*texts: str) -> Words:
    return Words({tuple(text.encode()) for text in texts}, vocab_size=300)


@pytest.mark.parametrize(
    ("texts", "stop", "found"),
    [
        (["abcd"], ("b",), "abcd"),  # in the midst of it a stop text is text
        (["abcd"], ("cd",), "ab"),
        (["ab", "abxy"], ("b",), "a"),  # it may end there
        (["a\u00e9b"], ("\u00e9",), "a\u00e9b"),
    ],
)
def test_stop_texts_end_an_output_only_where_it_may(texts: list[str], stop: tuple[str, ...], found: str) -> None:
    (completion,), events = run(text_words(*texts), tokenizer=byte_tokenizer(), vocab_size=300, eos=(), stop=stop)
    assert (completion.text, completion.finish_reason) == (found, FinishReason.STOP)
    assert "".join(event.text for event in events) + completion.last_text == found


@given(
    pieces=st.lists(st.tuples(st.text("ab", max_size=3), st.booleans()), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_stop_texts_that_may_not_stop_lose_no_character(pieces: list[tuple[str, bool]], stops: list[str]) -> None:
    matcher, given_out, whole = StopMatcher(stops), "", ""
    for piece, may_stop in pieces:
        text, is_stopped = matcher.push(piece, may_stop=may_stop)
        given_out, whole = given_out + text, whole + piece
        if is_stopped:
            assert may_stop and any(whole.startswith(given_out + stop) for stop in stops)
            return
        assert whole.startswith(given_out)
    assert given_out + matcher.flush() == whole


def test_a_stop_text_that_was_held_while_it_might_not_stop_is_text() -> None:
    matcher = StopMatcher(["a", "aab"])
    assert matcher.push("aa", may_stop=False) == ("", False)
    assert matcher.push("c") == ("aac", False)
    assert matcher.push("ca") == ("c", True)


def test_a_cancelled_request_starts_no_constraint() -> None:
    source, cancel = Words({(3,)}), threading.Event()
    cancel.set()
    manifest = make_manifest(max_batch=1, max_context=100, vocab_size=V)
    batch = Batch(RandomEngine(manifest), None, GenerationDefaults(eos_token_ids=()))
    batch.add(Request((1,), GenerationConfig(max_new_tokens=3, stop=()), cancel, constraint=source))
    (completion,) = batch.step()
    assert isinstance(completion, Completion) and completion.finish_reason is FinishReason.CANCELLED
    assert source.starts == 0
