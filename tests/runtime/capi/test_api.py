"""The interface as a program sees it, beside the Python runtime on the same bundle."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.runtime.generation.generator import Generator as PythonGenerator
from tests.runtime.capi.client import HEADER, CallError, Generator, Library, Model, Output, read_header


@pytest.fixture(scope="module")
def model(library: Library, text_bundle: Path, onnxruntime: Path) -> Iterator[Model]:
    with Model(library, text_bundle, onnxruntime=onnxruntime, threads=1) as opened:
        yield opened


@pytest.fixture
def generator(model: Model) -> Iterator[Generator]:
    with Generator(model) as made:
        yield made


@pytest.fixture(scope="module")
def python(text_bundle: Path) -> Iterator[PythonGenerator]:
    with PythonGenerator.open(text_bundle, threads=1, kernels="onnxruntime") as opened:
        yield opened


def assert_same(found: Output, expected: Any) -> None:
    """All that a completion says is what the Python runtime's says."""
    assert found.token_ids == list(expected.token_ids)
    assert found.text == expected.text
    assert found.streamed == expected.text
    assert found.finish == expected.finish_reason.value
    assert found.prompt_tokens == expected.prompt_tokens
    assert found.cached_tokens == expected.cached_tokens


TEXTS = ["Hello", "", "Ünïcödé 漢字 🙂 e\u0301", "a" * 300, "line\nline\r\n\ttab", "<|im_end|> inside", "0123 4567"]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 5},
    {"max_new_tokens": 40, "ignore_eos": True},
    {"max_new_tokens": 24, "repetition_penalty": 1.3, "ignore_eos": True},
    {"max_new_tokens": 24, "presence_penalty": 0.5, "frequency_penalty": 0.7, "ignore_eos": True},
    {"max_new_tokens": 12, "logit_bias": {7: 30.0, 9: -100.0}, "ignore_eos": True},
    {"max_new_tokens": 12, "suppress_tokens": [3, 5, 8], "min_new_tokens": 6},
    {"max_new_tokens": 16, "stop_token_ids": list(range(40)), "ignore_eos": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: ",".join(each) or "defaults")
def test_greedy_answers_are_the_python_runtimes(
    generator: Generator, python: PythonGenerator, settings: dict[str, Any]
) -> None:
    for text in TEXTS:
        assert_same(generator.generate(text, **settings), python.generate(text, **settings))


def test_stop_texts(generator: Generator, python: PythonGenerator) -> None:
    whole = python.generate("Hello", max_new_tokens=60, ignore_eos=True).text
    assert whole is not None and len(whole) > 12
    for start in (0, 3, len(whole) // 2):
        for length in (1, 2, 5):
            settings = {"max_new_tokens": 60, "ignore_eos": True, "stop": [whole[start : start + length], "nowhere"]}
            assert_same(generator.generate("Hello", **settings), python.generate("Hello", **settings))


def test_sampled_answers_with_a_seed(generator: Generator, python: PythonGenerator) -> None:
    """Random weights spread the probability over the vocabulary: a draw within an ulp of a boundary is that rare."""
    for seed in range(12):
        for settings in (
            {"temperature": 1.0},
            {"temperature": 0.7, "top_k": 20},
            {"temperature": 1.3, "top_p": 0.8},
            {"temperature": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
        ):
            chosen = {"max_new_tokens": 20, "ignore_eos": True, "seed": seed, **settings}
            assert_same(generator.generate("Once", **chosen), python.generate("Once", **chosen))


def test_choices_share_their_prompt(generator: Generator, python: PythonGenerator) -> None:
    settings = {"max_new_tokens": 8, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    number = generator.submit("Several", n=5, **settings)
    outputs = generator.run()
    expected = python.generate("Several", n=5, **settings)
    assert [outputs[number, choice].token_ids for choice in range(5)] == [list(each.token_ids) for each in expected]


def test_many_at_once_are_as_alone(generator: Generator) -> None:
    source = random.Random(0)
    prompts = [[source.randrange(0, 250) for _ in range(source.randrange(1, 90))] for _ in range(30)]
    numbers = [generator.submit(prompt, max_new_tokens=1 + i % 9, ignore_eos=True) for i, prompt in enumerate(prompts)]
    outputs = generator.run()
    for i, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        alone = generator.generate(prompt, max_new_tokens=1 + i % 9, ignore_eos=True)
        assert outputs[number, 0].token_ids == alone.token_ids
    assert numbers == sorted(set(numbers))


def test_requests_start_from_what_others_of_their_scope_left(generator: Generator) -> None:
    prompt = list(range(60))
    cached = []
    for scope in (0, 2**64 - 1, 0, 2**64 - 1):
        number = generator.submit(prompt, keep_cache=True, cache_scope=scope, max_new_tokens=2, ignore_eos=True)
        cached.append(generator.run()[number, 0].cached_tokens)
    assert cached == [0, 0, 58, 58]


def test_log_probabilities(generator: Generator, python: PythonGenerator) -> None:
    settings = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": 3, "prompt_logprobs": 2}
    found, expected = generator.generate("Log", **settings), python.generate("Log", **settings)
    assert_same(found, expected)
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours[0] == pytest.approx(theirs.token, abs=2e-6)
        assert [token for token, _ in ours[1]] == [token for token, _ in theirs.top]
        assert [value for _, value in ours[1]] == pytest.approx([value for _, value in theirs.top], abs=2e-6)
    assert expected.prompt_logprobs is not None
    assert found.prompt_logprobs[0] is None and expected.prompt_logprobs[0] is None
    for ours, theirs in zip(found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert ours is not None and theirs is not None
        assert ours[0] == pytest.approx(theirs.token, abs=2e-6)
        assert [token for token, _ in ours[1]] == [token for token, _ in theirs.top]


CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "<|im_end|> and <|im_start|>user")],
    [("user", ""), ("assistant", ""), ("user", "漢字 🙂")],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_conversations(
    model: Model, generator: Generator, python: PythonGenerator, messages: list[tuple[str, str]]
) -> None:
    said = [{"role": role, "content": content} for role, content in messages]
    expected = replace(
        python.chat(said, max_new_tokens=12), cached_tokens=0
    )  # Python's starts from the last one's cache
    assert_same(generator.generate(messages, max_new_tokens=12), expected)
    assert len(model.encode(messages)) == expected.prompt_tokens


def test_a_chat_keeps_its_cache(library: Library, model: Model, generator: Generator) -> None:
    chat, config = ctypes.c_void_p(), ctypes.c_void_p()
    library.config_create(ctypes.byref(config))
    library.config_set_max_new_tokens(config, 6)
    library.chat_create(generator.handle, config, b"Be brief.", 9, ctypes.byref(chat))
    completion = ctypes.c_void_p()
    cached = []
    for text in (b"Hello", b"And now?", b"Again"):
        library.chat_send(chat, text, len(text), None, None, ctypes.byref(completion))
        cached.append(library.event_cached_tokens(completion))
    assert cached[0] == 0 and 0 < cached[1] < cached[2]
    library.chat_reset(chat)
    library.chat_send(chat, b"Hello", 5, None, None, ctypes.byref(completion))
    assert library.event_cached_tokens(completion) > 0  # the system prompt
    library.chat_free(chat)
    library.config_free(config)


def test_facts(library: Library, model: Model, text_bundle: Path) -> None:
    assert model.fact("FORMAT_VERSION") == 2
    assert model.fact("HAS_TOKENIZER") == model.fact("HAS_CHAT_TEMPLATE") == 1
    assert model.fact("HAS_VISION") == 0
    assert library.given("model_target", model.handle) == "cpu"
    assert library.given("model_precision", model.handle) == "fp32"
    count = ctypes.c_size_t()
    pointer = library.model_eos_token_ids(model.handle, ctypes.byref(count))
    assert count.value > 0 and pointer
    with pytest.raises(CallError, match="fact is 99") as caught:
        library.model_fact(model.handle, 99, ctypes.byref(ctypes.c_int64()))
    assert caught.value.name == "UNSUPPORTED"


def test_raw_rows(library: Library, model: Model, generator: Generator) -> None:
    """Greedy by hand over raw rows gives what a generator gives."""
    prompt = [5, 9, 200, 31]
    expected = generator.generate(prompt, max_new_tokens=10, ignore_eos=True).token_ids
    rows, logits = ctypes.c_void_p(), ctypes.c_void_p()
    library.rows_create(model.handle, ctypes.byref(rows))
    vocab = model.fact("VOCAB_SIZE")

    def best() -> int:
        assert logits.value is not None
        values = list((ctypes.c_float * vocab).from_address(logits.value))
        return values.index(max(values))

    def ids(*values: int) -> Any:
        return (ctypes.c_int32 * len(values))(*values)

    library.rows_prefill(rows, 1, ids(*prompt), len(prompt), ctypes.byref(logits))
    found = [best()]
    while len(found) < 10:
        library.rows_decode(rows, 1, ids(found[-1]), 1, ctypes.byref(logits))
        found.append(best())
    assert found == expected
    length = ctypes.c_int64()
    library.rows_length(rows, 1, ctypes.byref(length))
    assert length.value == len(prompt) + 9
    # A copy, cut to the prompt less one, goes on as the first did.
    library.rows_copy(rows, 1, 0, length.value)
    library.rows_truncate(rows, 0, len(prompt) - 1)
    library.rows_decode(rows, 0, ids(prompt[-1], -1), 2, ctypes.byref(logits))
    assert best() == expected[0]
    for call, arguments in (
        ("rows_prefill", (9, ids(1), 1, ctypes.byref(logits))),
        ("rows_prefill", (-1, ids(1), 1, ctypes.byref(logits))),
        ("rows_prefill", (0, ids(1), 0, ctypes.byref(logits))),
        ("rows_prefill", (0, ids(vocab), 1, ctypes.byref(logits))),
        ("rows_prefill", (0, ids(-2), 1, ctypes.byref(logits))),
        ("rows_decode", (0, ids(-2), 1, ctypes.byref(logits))),
        ("rows_truncate", (0, 500)),
        ("rows_truncate", (0, -1)),
        ("rows_copy", (0, 0, 1)),
        ("rows_copy", (0, 1, 500)),
        ("rows_length", (64, ctypes.byref(length))),
    ):
        with pytest.raises(CallError) as caught:
            getattr(library, call)(rows, *arguments)
        assert caught.value.name == "INVALID_ARGUMENT", (call, caught.value)
    too_many = ids(*[1] * (model.fact("MAX_CONTEXT") + 1))
    with pytest.raises(CallError) as caught:
        library.rows_prefill(rows, 0, too_many, len(too_many), ctypes.byref(logits))
    assert caught.value.name == "CONTEXT_FULL"
    library.rows_free(rows)


def test_nothing_given_is_no_crash(library: Library) -> None:
    """Every function, with NULL and 0 for all that it takes."""
    functions, _ = read_header(HEADER.read_text(encoding="utf-8"))
    assert len(functions) > 90
    for function in functions:
        name = function.name.removeprefix("qwen_aot_")
        native = getattr(library.dll, function.name)
        zeros = [0.0 if kind is ctypes.c_double else 0 for kind in native.argtypes]
        result = native(*zeros)
        if function.result == "qwen_aot_status" and name not in ("error_status", "event_status"):
            assert result == library.number("INVALID_ARGUMENT"), name


@pytest.mark.parametrize(
    ("setter", "values"),
    [
        ("max_new_tokens", [0, -1]),
        ("min_new_tokens", [-1]),
        ("temperature", [-0.1, 0.0001, 1001.0, float("nan"), float("inf")]),
        ("top_k", [-1]),
        ("top_p", [0.0, 1.1, float("nan")]),
        ("min_p", [-0.1, 1.1, float("nan")]),
        ("repetition_penalty", [0.0, 0.0001, 1001.0]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("n", [0, 129]),
        ("logprobs", [-2, 101]),
        ("prompt_logprobs", [-2, 101]),
        ("ignore_eos", [2, -1]),
    ],
)
def test_settings_out_of_range(library: Library, setter: str, values: list[Any]) -> None:
    config = ctypes.c_void_p()
    library.config_create(ctypes.byref(config))
    for value in values:
        with pytest.raises(CallError, match="accepted") as caught:
            getattr(library, f"config_set_{setter}")(config, value)
        assert caught.value.name == "INVALID_ARGUMENT"
    library.config_free(config)


def test_requests_that_can_not_be_served(generator: Generator, model: Model) -> None:
    vocab, context = model.fact("VOCAB_SIZE"), model.fact("MAX_CONTEXT")
    for prompt, settings, name in (
        ([vocab], {}, "INVALID_ARGUMENT"),
        ([-1], {}, "INVALID_ARGUMENT"),
        ([1], {"stop_token_ids": [vocab]}, "INVALID_ARGUMENT"),
        ([1], {"logit_bias": {vocab: 1.0}}, "INVALID_ARGUMENT"),
        ([1], {"min_new_tokens": 5, "max_new_tokens": 4}, "INVALID_ARGUMENT"),
        ([1], {"suppress_tokens": list(range(vocab))}, "INVALID_ARGUMENT"),
        ([1] * (context + 1), {}, "CONTEXT_FULL"),
        ([("tool", "x")], {}, "UNSUPPORTED"),
    ):
        with pytest.raises(CallError) as caught:
            generator.submit(prompt, **settings)  # type: ignore[arg-type]
        assert caught.value.name == name, (settings, caught.value)
    assert generator.generate([1] * context, max_new_tokens=7).finish in ("length", "stop")


def test_texts_that_are_not_utf8(library: Library, model: Model) -> None:
    count = ctypes.c_size_t()
    for data in (b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"):
        with pytest.raises(CallError, match="UTF-8") as caught:
            library.tokenize(model.handle, data, len(data), 0, None, 0, ctypes.byref(count))
        assert caught.value.name == "INVALID_ARGUMENT"


def test_a_buffer_that_is_too_small_tells_the_size(library: Library, model: Model) -> None:
    ids = (ctypes.c_int32 * 2)(-7, -7)
    count = ctypes.c_size_t()
    with pytest.raises(CallError) as caught:
        library.tokenize(model.handle, b"several tokens here", 19, 0, ids, 2, ctypes.byref(count))
    assert caught.value.name == "BUFFER_TOO_SMALL"
    assert count.value == len(model.tokenize("several tokens here")) > 2
    assert list(ids) == [-7, -7]


def test_a_bundle_that_is_nowhere(library: Library, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CallError, match=str(path)) as caught:
            Model(library, path)
        assert caught.value.name in ("IO", "BUNDLE")


def test_messages_are_utf8_whatever_files_are_called(library: Library, text_bundle: Path, tmp_path: Path) -> None:
    """Names of files are any bytes, and a long path is cut in a message."""
    bundle = Path(shutil.copytree(text_bundle, tmp_path / "bundle"))
    outside = os.fsencode(tmp_path) + b"/\xff\xc3.qtok"
    (bundle / "tokenizer.qtok").rename(os.fsdecode(outside))
    os.symlink(outside, os.fsencode(bundle / "tokenizer.qtok"))
    with pytest.raises(CallError, match=r"a link to .*/\?\?\.qtok, outside the bundle") as caught:
        Model(library, bundle)
    assert caught.value.name == "BUNDLE"
    for start in ("", "x", "xy"):
        with pytest.raises(CallError, match="doesn't exist"):
            Model(library, tmp_path / (start + "漢" * 80) / ("漢" * 80) / ("漢" * 80))


def test_an_engine_library_that_is_nowhere(library: Library, text_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CallError, match=r"nowhere\.so") as caught:
        Model(library, text_bundle, onnxruntime=tmp_path / "nowhere.so")
    assert caught.value.name == "ENGINE_MISMATCH"


def test_versions(library: Library) -> None:
    assert library.api_version() >> 16 == 1
    assert library.text(library.version())
    assert library.text(library.status_name(9)) == "BUSY"
    assert library.text(library.status_name(-5)) == "unknown"
