"""First-generation Qwen in C: each row by the alpha of its own prompt, as in Python and as the statement says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tests.first_qwen import POSITIONS, SEQ_LENGTH, VOCAB
from tests.runtime.capi.client import Generator, Library, Model
from tests.runtime.capi.engines import Dialog, NativeEngine
from tests.runtime.capi.native import Native
from tests.runtime.first_qwen import BOUND, TOKENS, ids, shared_bundle, statement, wanted

GREEDY = {"temperature": 0.0, "ignore_eos": 1, "max_new_tokens": TOKENS}
Prompt = tuple[int, ...]


@pytest.fixture
def generator(library: Library, onnxruntime: Path, shared_folder: Path) -> Iterator[Generator]:
    with (
        Model(library, shared_bundle(shared_folder), threads=1, onnxruntime=onnxruntime) as model,
        Generator(model) as made,
    ):
        yield made


def answers(generator: Generator, prompts: list[Prompt], **how: int) -> list[tuple[Prompt, int]]:
    """Each answer, and how many tokens were cached."""
    numbers = [generator.submit(prompt, **how, **GREEDY) for prompt in prompts]
    outputs = generator.run()
    assert [outputs[number, 0].error for number in numbers] == [""] * len(prompts)
    return [(tuple(outputs[number, 0].token_ids), outputs[number, 0].cached_tokens) for number in numbers]


def test_prompts_of_all_alphas_at_once(generator: Generator) -> None:
    prompts = [ids(count, count) for count in (1, 31, 32, 33, 64, 65, 90, 118)]
    assert answers(generator, prompts) == [(wanted(prompt), 0) for prompt in prompts]


def test_a_conversation_whose_alpha_changes_is_prefilled_again(generator: Generator) -> None:
    first = ids(22)
    ((answer, _),) = answers(generator, [first], keep_cache=True)
    second = (*first, *answer, *ids(2, 2))
    assert len(first) < SEQ_LENGTH < len(second)
    ((answer, cached),) = answers(generator, [second], keep_cache=True)
    assert (answer, cached) == (wanted(second), 0)
    third = (*second, *answer, *ids(3, 3))
    ((answer, cached),) = answers(generator, [third], keep_cache=True)
    assert answer == wanted(third) and cached >= len(second)


def test_prompts_in_prefill_are_followed_within_one_alpha_only(generator: Generator) -> None:
    prompts = [(*ids(60, 5), *ids(count, count)) for count in (2, 4, 9, 3, 30)]
    found = answers(generator, prompts, keep_cache=True)
    assert [answer for answer, _ in found] == [wanted(prompt) for prompt in prompts]


@pytest.mark.parametrize("seed", range(2))
def test_any_mix_of_requests(seed: int, generator: Generator) -> None:
    random = Random(seed)
    prompts: list[Prompt] = []
    for number in range(16):
        begun = random.choice(prompts)[: random.randint(1, 100)] if prompts and random.random() < 0.8 else ()
        prompts.append((*begun, *ids(random.randint(1, POSITIONS - TOKENS - len(begun)), number)))
    for start in range(0, len(prompts), 4):
        together = prompts[start : start + 4]
        found = answers(generator, together, keep_cache=True)
        assert [answer for answer, _ in found] == [wanted(prompt) for prompt in together]


@pytest.fixture
def engine(native: Native, onnxruntime: Path, shared_folder: Path) -> Iterator[NativeEngine]:
    with Dialog(native.program("engine")) as dialog:
        where = {"bundle": str(shared_bundle(shared_folder)), "onnxruntime": str(onnxruntime)}
        dialog.want("open", engines=1, threads=1, **where)
        yield NativeEngine(dialog, 6, VOCAB)


def close(found: np.ndarray, text: Prompt, first_step: int | None = None) -> None:
    np.testing.assert_allclose(found, statement().logits(text, first_step)[-1], atol=BOUND)


def test_an_engine_is_told_of_the_rest_of_a_prompt(engine: NativeEngine) -> None:
    text = np.array(ids(50))
    engine.prefill(0, text[:20], prompt_tokens=50)
    close(engine.prefill(0, text[20:]), ids(50))
    engine.truncate(0, 0)
    engine.prefill(0, text[:20])
    close(engine.prefill(0, text[20:]), ids(50), 20)


def test_a_copied_row_keeps_its_table_and_an_emptied_one_does_not(engine: NativeEngine) -> None:
    text = np.array(ids(40))
    engine.prefill(1, text)
    engine.copy_row(1, 3, 36)
    close(engine.prefill(3, text[36:], prompt_tokens=4), ids(40))
    engine.truncate(1, 0)
    close(engine.decode(1, text[:1])[0], ids(1))
    close(engine.prefill(1, text[1:20]), ids(20), 1)
