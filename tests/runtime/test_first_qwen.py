"""First-generation Qwen from a folder to answers: each request by the alpha of its own prompt, whatever is cached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import rotary_table
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.request import Completion, Request
from tests.first_qwen import POSITIONS, SEQ_LENGTH
from tests.runtime.first_qwen import BOUND, TOKENS, ids, shared_bundle, statement, wanted

GREEDY = GenerationConfig(max_new_tokens=TOKENS, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", params=[None, 4], ids=["plain", "speculates"])
def bundle(request: pytest.FixtureRequest, shared_folder: Path) -> Path:
    return shared_bundle(shared_folder, request.param)


@pytest.fixture
def generator(bundle: Path) -> Iterator[Generator]:
    with Generator.open(bundle, threads=1) as opened:
        yield opened


def answers(generator: Generator, *requests: Request) -> list[Completion]:
    ends = [event for event in generator.stream(list(requests)) if isinstance(event, Completion)]
    return sorted(ends, key=lambda end: (end.index, end.choice))


def kept(*prompt: int) -> Request:
    return Request(prompt, GREEDY, keep_cache=True)


def test_the_bundle_says_where_tables_end(bundle: Path) -> None:
    text = load_bundle(bundle).manifest.engines.text
    assert text.rotary_length == SEQ_LENGTH
    tables = {tokens: rotary_table(text.rotary_length, tokens) for tokens in (1, 32, 33, 64, 65, 128)}
    assert tables == {1: 0, 32: 0, 33: 1, 64: 1, 65: 2, 128: 2}


def test_prompts_of_all_alphas_at_once(generator: Generator) -> None:
    prompts = [ids(count, count) for count in (1, 31, 32, 33, 64, 65, 90, 118)]
    found = answers(generator, *(Request(prompt, GREEDY) for prompt in prompts))
    assert [end.token_ids for end in found] == [wanted(prompt) for prompt in prompts]


def test_an_answer_beyond_the_trained_length_keeps_its_prompts_alpha(generator: Generator) -> None:
    config = GenerationConfig(max_new_tokens=80, temperature=0, ignore_eos=True)
    (end,) = answers(generator, Request(ids(20), config))
    assert end.token_ids == wanted(ids(20), 80)


def test_a_conversation_whose_alpha_changes_is_prefilled_again(generator: Generator) -> None:
    first = ids(22)
    (end,) = answers(generator, kept(*first))
    second = (*first, *end.token_ids, *ids(2, 2))
    assert len(first) < SEQ_LENGTH < len(second)
    (end,) = answers(generator, kept(*second))
    assert (end.cached_tokens, end.token_ids) == (0, wanted(second))
    third = (*second, *end.token_ids, *ids(3, 3))
    (end,) = answers(generator, kept(*third))
    assert end.cached_tokens >= len(second) and end.token_ids == wanted(third)
    (end,) = answers(generator, kept(*first, *ids(1, 4)))  # back below it, from a row of the other table
    assert end.token_ids == wanted((*first, *ids(1, 4)))


def test_prompts_in_prefill_are_followed_within_one_alpha_only(generator: Generator) -> None:
    """They share all but their ends, arrive together, and are copied from row to row."""
    shared = ids(60, 5)
    prompts = [(*shared, *ids(count, count)) for count in (2, 4, 9, 3, 30)]
    found = answers(generator, *(kept(*prompt) for prompt in prompts))
    assert [end.token_ids for end in found] == [wanted(prompt) for prompt in prompts]


def test_choices_share_their_prompts_alpha(generator: Generator) -> None:
    config = GenerationConfig(max_new_tokens=TOKENS, temperature=0, ignore_eos=True, n=3)
    found = answers(generator, Request(ids(40), config), Request(ids(20), GREEDY))
    assert [end.token_ids for end in found] == [wanted(ids(40))] * 3 + [wanted(ids(20))]


def test_log_probabilities_of_a_prompt_are_by_the_whole_prompts_alpha(generator: Generator) -> None:
    """It is fed a token a step."""
    config = GenerationConfig(max_new_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=0)
    (end,) = answers(generator, Request(ids(70), config))
    logits = statement().logits(ids(70))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert end.prompt_logprobs is not None
    found = [each.token for each in end.prompt_logprobs[1:] if each is not None]
    np.testing.assert_allclose(found, [logprobs[place - 1, ids(70)[place]] for place in range(1, 70)], atol=BOUND)


def test_drafts_of_a_text_that_repeats_itself(generator: Generator) -> None:
    prompt = ids(11, 7) * 4
    (end,) = answers(generator, Request(prompt, GenerationConfig(max_new_tokens=40, temperature=0, ignore_eos=True)))
    assert end.token_ids == wanted(prompt, 40)


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_requests(seed: int, generator: Generator) -> None:
    random = Random(seed)
    prompts: list[tuple[int, ...]] = []
    for number in range(16):
        begun = random.choice(prompts)[: random.randint(1, 100)] if prompts and random.random() < 0.8 else ()
        prompts.append((*begun, *ids(random.randint(1, POSITIONS - TOKENS - len(begun)), number)))
    for start in range(0, len(prompts), 4):
        together = prompts[start : start + 4]
        found = answers(generator, *(kept(*prompt) for prompt in together))
        assert [end.token_ids for end in found] == [wanted(prompt) for prompt in together]


def close(found: np.ndarray, text: tuple[int, ...], first_step: int | None = None) -> None:
    np.testing.assert_allclose(found, statement().logits(text, first_step)[-1], atol=BOUND)


def test_an_engine_is_told_of_the_rest_of_a_prompt(generator: Generator) -> None:
    engine, text = generator.engine, np.array(ids(50))
    engine.prefill(0, text[:20], 50)
    close(engine.prefill(0, text[20:]), ids(50))
    engine.truncate(0, 0)
    engine.prefill(0, text[:20])
    close(engine.prefill(0, text[20:]), ids(50), 20)
    engine.truncate(0, 30)  # what is left keeps its table
    close(engine.prefill(0, text[30:], 50), ids(50), 20)


def test_a_copied_row_keeps_its_table_and_an_emptied_one_does_not(generator: Generator) -> None:
    engine, text = generator.engine, np.array(ids(40))
    engine.prefill(1, text)
    engine.copy_row(1, 3, 36)
    close(engine.prefill(3, text[36:], 4), ids(40))
    engine.truncate(1, 0)
    close(engine.decode(1, text[:1])[0], ids(1))
    close(engine.prefill(1, text[1:20]), ids(20), 1)


def test_rows_side_by_side_have_their_own_tables(generator: Generator) -> None:
    engine, texts = generator.engine, {0: ids(20, 1), 1: ids(40, 2), 3: ids(70, 3)}
    for row, text in texts.items():
        engine.prefill(row, np.array(text[:-1]))
    fed = np.array([texts[row][-1] if row in texts else -1 for row in range(4)])
    logits = engine.decode(0, fed)
    for row, text in texts.items():
        close(logits[row], text, len(text) - 1)
