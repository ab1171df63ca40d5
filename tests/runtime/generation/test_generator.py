"""The generation loop on a fake engine: batching, stopping, streaming, cancelling, limits."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.errors import ContextFullError, GenerationError
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from qwen_aot.runtime.generation.generator import EventStream, Generator
from qwen_aot.runtime.generation.options import OPTION_NAMES, GenerationOptions, resolve_each
from qwen_aot.runtime.generation.request import Completion, Event, FinishReason, Request, TokenEvent
from tests.runtime.fakes import FakeEngine
from tests.runtime.texts import byte_tokenizer
from tests.runtime.toys import VOCAB_SIZE, checksum, make_manifest

FOUR = GenerationConfig(max_new_tokens=4)


def make_generator(
    *,
    max_batch: int = 3,
    max_context: int = 40,
    bos_token_id: int | None = None,
    eos: tuple[int, ...] = (),
    poison: frozenset[int] = frozenset(),
) -> tuple[Generator, FakeEngine]:
    manifest = make_manifest(max_batch=max_batch, max_context=max_context, bos_token_id=bos_token_id, eos_token_ids=eos)
    engine = FakeEngine(manifest, poison=poison)
    return Generator(engine), engine


def continuation(prompt: list[int], count: int) -> list[int]:
    """What the checksum model says, one token at a time."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(checksum(sequence))
    return sequence[len(prompt) :]


def writer(text: str, *, max_batch: int = 2, max_context: int = 200) -> Generator:
    """A generator that answers any one-token prompt with this text, byte by byte, then <|end|>."""
    script = [*text.encode(), 256]

    def next_token(row: list[int]) -> int:
        return script[min(len(row), len(script)) - 1]

    manifest = make_manifest(max_batch=max_batch, max_context=max_context, vocab_size=300, eos_token_ids=(256,))
    return Generator(FakeEngine(manifest, next_token), byte_tokenizer())


def write(text: str, **options: object) -> tuple[list[str], Completion]:
    """The streamed texts and the completion of one request to `writer`."""
    generator = writer(text)
    config = generator.defaults.resolve(**options)  # type: ignore[arg-type]
    *tokens, completion = generator.stream([Request([1], config)])
    assert isinstance(completion, Completion)
    texts = [event.text for event in tokens if isinstance(event, TokenEvent)]
    assert "".join(texts) + completion.last_text == completion.text
    return texts, completion


def test_greedy_tokens_and_counts() -> None:
    generator, _ = make_generator()
    (completion,) = generator.generate([[5, 6, 7]], FOUR)
    assert completion.token_ids == tuple(continuation([5, 6, 7], 4))
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.index, completion.prompt_tokens, completion.cached_tokens) == (0, 3, 0)
    assert completion.text is None
    assert completion.logprobs == ()


def test_no_prompts() -> None:
    assert make_generator()[0].generate([]) == []


def test_more_prompts_than_rows_are_all_answered_in_order() -> None:
    generator, engine = make_generator(max_batch=3)
    prompts = [[i + 1] * (i + 1) for i in range(8)]
    completions = generator.generate(prompts, FOUR)
    assert [c.index for c in completions] == list(range(8))
    assert [list(c.token_ids) for c in completions] == [continuation(prompt, 4) for prompt in prompts]
    assert engine.rows == [[], [], []]


def test_a_finished_row_is_refilled_while_others_go_on() -> None:
    generator, engine = make_generator(max_batch=2)
    requests = [
        Request([1], GenerationConfig(max_new_tokens=9)),
        Request([2], GenerationConfig(max_new_tokens=2)),
        Request([3], GenerationConfig(max_new_tokens=2)),
    ]
    order = [event.index for event in generator.stream(requests) if isinstance(event, Completion)]
    assert order == [1, 2, 0]
    assert [row for row, _ in engine.prefills] == [0, 1, 1]


def test_the_step_covers_only_rows_in_use() -> None:
    generator, engine = make_generator(max_batch=3)
    requests = [Request([n + 1], GenerationConfig(max_new_tokens=n)) for n in (3, 7, 4)]
    list(generator.stream(requests))
    # The rows come in one by one; the first is done when the third comes; then the last.
    assert [(first, len(ids)) for first, ids in engine.decodes] == [(0, 1), (0, 2), *[(1, 2)] * 3, *[(1, 1)] * 2]


def test_an_idle_row_between_others_is_marked() -> None:
    generator, engine = make_generator(max_batch=3)
    long = [1] * 30  # 4 chunks
    requests = [Request(prompt, GenerationConfig(max_new_tokens=12)) for prompt in ([1], long, [2])]
    list(generator.stream(requests))
    assert [[id_ >= 0 for id_ in ids] for _, ids in engine.decodes[:6]] == [
        [True],  # while row 1 has its first chunk
        [True],  # row 2 its only one
        *[[True, False, True]] * 3,  # row 1 the other three
        [True, True, True],
    ]


def test_long_prompts_are_prefilled_in_chunks() -> None:
    generator, engine = make_generator()
    generator.generate([list(range(20))], GenerationConfig(max_new_tokens=1))
    assert [len(ids) for _, ids in engine.prefills] == [8, 8, 4]


def test_stop_ids_end_a_request_and_are_left_out() -> None:
    tokens = continuation([5, 6, 7], 4)
    generator, _ = make_generator(eos=(tokens[2],))
    (completion,) = generator.generate([[5, 6, 7]], generator.defaults.resolve())
    assert (list(completion.token_ids), completion.finish_reason) == (tokens[:2], "stop")
    (completion,) = generator.generate([[5, 6, 7]], generator.defaults.resolve(ignore_eos=True, max_new_tokens=4))
    assert (list(completion.token_ids), completion.finish_reason) == (tokens, "length")
    stop_at = generator.defaults.resolve(stop_token_ids=[tokens[0]])
    assert generator.generate([[5, 6, 7]], stop_at)[0].token_ids == ()


def test_text_streams_in_whole_characters() -> None:
    texts, completion = write("a😀b")
    assert texts == ["a", "", "", "", "😀", "b"]
    assert (completion.text, completion.finish_reason) == ("a😀b", "stop")
    assert completion.token_ids == tuple("a😀b".encode())


def test_a_stop_string_ends_the_text_before_it() -> None:
    texts, completion = write("Hello END more", stop=[" END", "zzz"])
    assert texts == ["H", "e", "l", "l", "o", "", "", "", ""]
    assert (completion.text, completion.finish_reason) == ("Hello", "stop")
    assert bytes(completion.token_ids) == b"Hello END"


@pytest.mark.parametrize("stop", ["<|end|>", "x<|end|>"])
def test_a_stop_string_that_is_a_special_token_is_its_id(stop: str) -> None:
    # "x<|end|>" isn't one, and the text of special tokens is never part of the output.
    _, completion = write("abc", stop=[stop], ignore_eos=True, max_new_tokens=9)
    expected = ("stop", 3) if stop == "<|end|>" else ("length", 9)
    assert (completion.finish_reason, len(completion.token_ids)) == expected
    assert completion.text == "abc"


def test_what_looked_like_a_stop_string_comes_out_in_the_end() -> None:
    texts, completion = write("a EN", stop=[" END"])
    assert texts == ["a", "", "", ""]
    assert (completion.last_text, completion.text, completion.finish_reason) == (" EN", "a EN", "stop")


def test_max_tokens_inside_a_character() -> None:
    texts, completion = write("a😀b", max_new_tokens=3)
    assert texts == ["a", "", ""]
    assert (completion.text, completion.finish_reason) == ("a�", "length")


def test_text_prompts_and_text_out() -> None:
    generator = writer("xyz")
    assert [c.text for c in generator.generate(["A", "B", "C"])] == ["xyz"] * 3


def test_the_context_ends_a_request_with_length() -> None:
    generator, _ = make_generator(max_context=10)
    (completion,) = generator.generate([[1] * 7], GenerationConfig())
    # 7 in the cache, 3 more fed, and the last one comes from a full cache.
    assert list(completion.token_ids) == continuation([1] * 7, 4)
    assert completion.finish_reason == "length"
    assert len(generator.generate([[1] * 10], GenerationConfig())[0].token_ids) == 1


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs() -> None:
    generator, engine = make_generator(max_context=10)
    with pytest.raises(ContextFullError, match=r"the prompt has 11 tokens, the context holds 10: .*--max-context 11"):
        generator.generate([[1], [1] * 11])
    assert engine.prefills == []


def test_an_empty_prompt_starts_from_bos_or_is_refused() -> None:
    generator, _ = make_generator(bos_token_id=9)
    assert list(generator.generate([[]], FOUR)[0].token_ids) == continuation([9], 4)
    with pytest.raises(GenerationError, match="the prompt is empty and the model has no BOS token"):
        make_generator()[0].generate([[]])


def test_what_cannot_be_taken_is_refused_before_anything_runs() -> None:
    generator, engine = make_generator()
    with pytest.raises(GenerationError, match=f"has the token id {VOCAB_SIZE}; accepted: 0 to {VOCAB_SIZE - 1}"):
        generator.generate([[1], [VOCAB_SIZE]])
    with pytest.raises(GenerationError, match="has the token id -1"):
        generator.generate([[-1]])
    with pytest.raises(GenerationError, match="has no tokenizer, so it takes and gives token ids only"):
        generator.generate(["text"])
    with pytest.raises(GenerationError, match="has no tokenizer"):
        generator.generate([[1]], GenerationConfig(stop=("x",)))
    with pytest.raises(GenerationError, match="has no tokenizer, so it takes and gives token ids only"):
        generator.generate("text")
    assert engine.prefills == []


def test_cancelling_ends_running_and_waiting_requests() -> None:
    generator, engine = make_generator(max_batch=1)
    cancel = threading.Event()
    events: list[Event] = []
    for event in generator.stream([Request([n], GenerationConfig(), cancel) for n in (1, 2)]):
        events.append(event)
        if len(events) == 3:
            cancel.set()
    first, second = (event for event in events if isinstance(event, Completion))
    assert {first.finish_reason, second.finish_reason} == {FinishReason.CANCELLED}
    by_index = {event.index: event for event in (first, second)}
    assert (list(by_index[0].token_ids), by_index[1].token_ids) == (continuation([1], 3), ())
    assert engine.rows == [[]]


def test_one_request_is_cancelled_and_the_others_go_on() -> None:
    generator, _ = make_generator()
    cancel = threading.Event()
    requests = [
        Request([1], GenerationConfig(max_new_tokens=9), cancel),
        Request([2], GenerationConfig(max_new_tokens=9)),
    ]
    completions: dict[int, Completion] = {}
    for number, event in enumerate(generator.stream(requests)):
        if number == 4:
            cancel.set()
        if isinstance(event, Completion):
            completions[event.index] = event
    assert completions[0].finish_reason == "cancelled"
    assert list(completions[0].token_ids) == continuation([1], len(completions[0].token_ids))
    assert list(completions[1].token_ids) == continuation([2], 9)


def test_cancelling_during_a_long_prefill() -> None:
    generator, engine = make_generator()
    cancel = threading.Event()
    prefill = engine.prefill

    def prefill_then_cancel(row: int, token_ids: np.ndarray, prompt_tokens: int | None = None) -> np.ndarray:
        cancel.set()
        return prefill(row, token_ids, prompt_tokens)

    engine.prefill = prefill_then_cancel  # type: ignore[method-assign]
    (completion,) = generator.generate([list(range(30))], FOUR, cancel=cancel)
    assert (completion.finish_reason, completion.token_ids) == ("cancelled", ())
    assert len(engine.prefills) == 1 and engine.rows[0] == []


def test_closing_the_iterator_frees_the_rows() -> None:
    generator, engine = make_generator()
    stream = generator.stream([Request([1], GenerationConfig()), Request([2], GenerationConfig())])
    for _ in range(4):
        next(stream)
    with pytest.raises(GenerationError, match="another stream of this generator isn't finished"):
        next(generator.stream([Request([3], FOUR)]))
    stream.close()
    assert engine.rows == [[], [], []]
    assert list(generator.generate([[3]], FOUR)[0].token_ids) == continuation([3], 4)


def test_a_failed_step_frees_the_rows() -> None:
    generator, engine = make_generator()
    decode = engine.decode
    engine.decode = lambda first_row, token_ids: (_ for _ in ()).throw(GenerationError("NaN"))  # type: ignore[method-assign]
    with pytest.raises(GenerationError, match="NaN"):
        generator.generate([[1], [2]], FOUR)
    assert engine.rows == [[], [], []]
    engine.decode = decode  # type: ignore[method-assign]
    assert list(generator.generate([[3]], FOUR)[0].token_ids) == continuation([3], 4)


def test_a_request_that_fails_leaves_the_others_alone() -> None:
    tokens = continuation([1], 4)
    # The first fails when its second token is fed, the third in its prefill; the second and fourth are sound.
    generator, engine = make_generator(max_batch=2, poison=frozenset({tokens[1], 200}))
    stream = generator.stream([Request(prompt, FOUR) for prompt in ([1], [2], [3, 200], [4])])
    completions: dict[int, Completion] = {}
    with pytest.raises(NonFiniteLogitsError, match="the logits of row 0 hold NaN or Inf"):
        for event in stream:
            if isinstance(event, Completion):
                completions[event.index] = event
    assert [completions[i].finish_reason for i in range(4)] == ["error", "length", "error", "length"]
    assert [list(completions[i].token_ids) for i in range(4)] == [
        tokens[:2],
        continuation([2], 4),
        [],
        continuation([4], 4),
    ]
    assert isinstance(completions[0].error, NonFiniteLogitsError) and completions[1].error is None
    assert engine.rows == [[], []]


def test_a_failed_request_of_generate_is_raised() -> None:
    generator, _ = make_generator(poison=frozenset({200}))
    with pytest.raises(NonFiniteLogitsError):
        generator.generate([[1], [200]], FOUR)
    assert list(generator.generate([[3]], FOUR)[0].token_ids) == continuation([3], 4)


@pytest.mark.parametrize("close_after", [1, 4, 5])
def test_a_closed_stream_leaves_the_rows_that_keep_their_cache(close_after: int) -> None:
    generator, engine = make_generator(max_batch=2)
    kept = Request([1, 2, 3], GenerationConfig(), keep_cache=True)
    stream = generator.stream([kept, Request([4], GenerationConfig())])
    for _ in range(close_after):
        next(stream)
    held = list(engine.rows[0])
    stream.close()
    assert engine.rows == [held, []]
    again = list(generator.stream([Request([*held, 9, 9], FOUR, keep_cache=True)]))[-1]
    assert isinstance(again, Completion)
    assert (again.cached_tokens, list(again.token_ids)) == (len(held), continuation([*held, 9, 9], 4))


def test_a_stop_string_that_the_prompt_began_ends_nothing() -> None:
    generator = writer("END of it")  # the writer goes by the row's length: "EN" is in the prompt
    config = generator.defaults.resolve(stop=["END"])
    assert generator.generate(["EN"], config)[0].text == "ND of it"


def test_logprobs_of_each_token() -> None:
    generator, _ = make_generator()
    config = GenerationConfig(max_new_tokens=3, logprobs=2)
    *events, completion = generator.stream([Request([5], config)])
    assert isinstance(completion, Completion)
    assert [event.logprobs for event in events if isinstance(event, TokenEvent)] == list(completion.logprobs)
    for token_id, found in zip(completion.token_ids, completion.logprobs, strict=True):
        logits = -np.abs(np.arange(VOCAB_SIZE) - token_id).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert found.token == pytest.approx(expected[token_id], abs=1e-5)
        assert found.top[0] == (token_id, pytest.approx(expected[token_id], abs=1e-5))
        assert len(found.top) == 2


def test_timings_add_up() -> None:
    generator, engine = make_generator()
    decode = engine.decode

    def slow(first_row: int, token_ids: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        return decode(first_row, token_ids)

    engine.decode = slow  # type: ignore[method-assign]
    started = time.perf_counter()
    timings = generator.generate([[1, 2]], FOUR)[0].timings
    assert 0 < timings.prefill <= timings.first_token
    assert 0.03 <= timings.decode <= time.perf_counter() - started - timings.first_token


def test_closing_the_generator_closes_the_engine() -> None:
    generator, engine = make_generator()
    with generator:
        pass
    assert engine.is_closed


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.builds(
            Request,
            st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40),
            st.builds(
                GenerationConfig,
                max_new_tokens=st.none() | st.integers(1, 12),
                temperature=st.sampled_from([0.0, 5.0]),
                repetition_penalty=st.sampled_from([1.0, 1.5]),
                seed=st.integers(0, 3),
            ),
            keep_cache=st.booleans(),
        ),
        min_size=1,
        max_size=7,
    ),
    max_batch=st.integers(1, 4),
)
def test_a_result_does_not_depend_on_the_batch(requests: list[Request], max_batch: int) -> None:
    generator, engine = make_generator(max_batch=max_batch)
    together = {e.index: e for e in generator.stream(requests) if isinstance(e, Completion)}
    # Only conversations stay in the cache.
    assert sum(map(len, engine.rows)) == 0 or any(request.keep_cache for request in requests)
    for index, request in enumerate(requests):
        alone = list(make_generator(max_batch=1)[0].stream([request]))[-1]
        assert isinstance(alone, Completion)
        assert together[index].token_ids == alone.token_ids
        assert together[index].finish_reason == alone.finish_reason


def test_defaults_of_a_bare_engine_are_greedy_with_the_models_eos() -> None:
    generator, _ = make_generator(eos=(3,))
    assert generator.defaults == GenerationDefaults(eos_token_ids=(3,))
    assert generator.defaults.resolve().is_greedy


@pytest.mark.parametrize("prompt", [b"text", bytearray(b"text"), [1.7, 2], [[1, 2]], ["1"], None])
def test_what_is_neither_text_nor_ids_is_refused(prompt: object) -> None:
    with pytest.raises(GenerationError, match="accepted: text, or a list of token ids"):
        writer("x").generate([prompt])  # type: ignore[list-item]


# What callers may give, and what they get for it.


def test_one_prompt_gives_one_completion_and_several_a_list() -> None:
    generator = writer("xyz")
    assert generator.generate("A").text == "xyz"
    assert generator.generate([65], max_new_tokens=2).text == "xy"
    assert generator.generate(np.array([65])).text == "xyz"  # type: ignore[call-overload]
    assert [c.text for c in generator.generate(["A", [66]])] == ["xyz"] * 2
    assert [c.text for c in generator.generate(("A",))] == ["xyz"]


@pytest.mark.parametrize("prompt", ["A", [65]])
def test_with_n_each_prompt_has_a_list(prompt: str | list[int]) -> None:
    generator = writer("xyz")
    options = {"temperature": 2.0, "top_k": 3, "max_new_tokens": 3, "seed": 7}
    three = generator.generate(prompt, n=3, **options)
    assert [completion.choice for completion in three] == [0, 1, 2]
    assert [c.index for group in generator.generate([prompt, prompt], n=2, **options) for c in group] == [0, 0, 1, 1]
    assert [len(group) for group in generator.generate([prompt], n=1)] == [1]
    events = list(generator.stream(prompt, n=2, max_new_tokens=2))
    assert sorted(event.choice for event in events if isinstance(event, Completion)) == [0, 1]
    with pytest.raises(GenerationError, match="the config has n=2: give n=2 as an option too"):
        generator.generate(prompt, GenerationConfig(n=2))
    assert len(generator.generate(prompt, GenerationConfig(n=2), n=2)) == 2


def test_options_and_configs() -> None:
    generator, _ = make_generator()
    longer = GenerationConfig(max_new_tokens=6, logprobs=1)
    assert len(generator.generate([1], longer).token_ids) == 6
    changed = generator.generate([1], longer, max_new_tokens=2)
    assert len(changed.token_ids) == len(changed.logprobs) == 2  # what isn't given stays
    each = generator.generate([[1], [2], [3]], [FOUR, longer, None], stop_token_ids=[])
    assert [len(completion.token_ids) for completion in each][:2] == [4, 6]
    with pytest.raises(GenerationError, match="config is a list of 1 for 2 prompts"):
        generator.generate([[1], [2]], [FOUR])
    with pytest.raises(GenerationError, match=r"config is \{\}; accepted: a GenerationConfig"):
        generator.generate([[1]], [{}])  # type: ignore[list-item]
    with pytest.raises(GenerationError, match="temperature is -1; accepted"):
        generator.generate([1], temperature=-1)


@pytest.mark.parametrize(
    ("name", "near"),
    [("max_tokens", "'max_new_tokens'"), ("temprature", "'temperature'"), ("stop_ids", "'stop_token_ids'"), ("zz", "")],
)
def test_a_wrong_option_names_near_ones(name: str, near: str) -> None:
    generator, engine = make_generator()
    match = rf"generate\(\) has no option '{name}': {'did you mean ' if near else ''}{near}.*accepted: .*max_new_tokens"
    with pytest.raises(TypeError, match=match):
        generator.generate([1], **{name: 3})  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"stream\(\) has no option"):
        generator.stream([1], **{name: 3})
    assert engine.prefills == []


def test_options_are_those_of_the_defaults() -> None:
    assert set(GenerationOptions.__annotations__) | {"n"} == OPTION_NAMES
    assert {"max_new_tokens", "temperature", "n", "min_p"} <= OPTION_NAMES and "self" not in OPTION_NAMES
    changed = resolve_each(GenerationDefaults(), GenerationConfig(), {"stop": ["a"], "stop_token_ids": [1]}, 1)
    assert changed == [GenerationConfig(stop=("a",), stop_token_ids=(1,))]


def test_streams_take_prompts_and_requests() -> None:
    generator, _ = make_generator()

    def given(stream: EventStream) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for event in stream:
            if isinstance(event, TokenEvent):
                found.setdefault(event.index, []).append(event.token_id)
        return found

    assert given(generator.stream([1], max_new_tokens=3)) == {0: continuation([1], 3)}
    assert given(generator.stream([[1], [2]], FOUR)) == {0: continuation([1], 4), 1: continuation([2], 4)}
    assert given(generator.stream(Request([1], FOUR))) == {0: continuation([1], 4)}
    with pytest.raises(GenerationError, match="a Request holds its own settings"):
        generator.stream([Request([1])], FOUR)
    with pytest.raises(GenerationError, match="a Request holds its own settings"):
        generator.stream([Request([1]), [2]])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"role": "user", "content": "Hi"}], r"a chat's messages .*: give those to chat\(\)"),
        ({"role": "user"}, "accepted: text, or a list of token ids"),
        (b"text", "accepted: text, or a list of token ids"),
        (5, "accepted: text, or a list of token ids"),
        (None, "accepted: text, or a list of token ids"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts: object, message: str) -> None:
    for call in (writer("x").generate, writer("x").stream):
        with pytest.raises(GenerationError, match=message):
            call(prompts)  # type: ignore[arg-type, operator]


def test_special_tokens_of_a_prompt() -> None:
    generator = writer("x")
    assert generator.generate("a<|end|>").prompt_tokens == 2
    assert generator.generate("a<|end|>", allow_special_tokens=False).prompt_tokens == len("a<|end|>")


def test_a_closed_generator() -> None:
    generator, _ = make_generator()
    generator.close()
    with pytest.raises(GenerationError, match="the engine is closed"):
        generator.generate([1])


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30), max_size=5),
    count=st.integers(1, 6),
)
def test_the_shape_of_the_result_is_that_of_the_prompts(prompts: list[list[int]], count: int) -> None:
    generator, _ = make_generator()
    expected = [continuation(prompt, count) for prompt in prompts]
    assert [list(c.token_ids) for c in generator.generate(prompts, max_new_tokens=count)] == expected
    assert [list(generator.generate(prompt, max_new_tokens=count).token_ids) for prompt in prompts] == expected
