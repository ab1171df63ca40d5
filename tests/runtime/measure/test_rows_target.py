"""The rows of an engine under load: each token has its time, and a row that fails is counted."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from qwen_aot.runtime.generation.service import GenerationService
from qwen_aot.runtime.measure.drive import ClosedLoop, Driven, drive
from qwen_aot.runtime.measure.outcome import Answer, Failure, FailureKind, Outcome
from qwen_aot.runtime.measure.rows_target import RowsTarget
from tests.runtime.server.servers import VOCABULARY, make_generator


def driven(
    concurrency: int, count: int, *, poison: int | None = None, end_after: int | None = None
) -> tuple[Driven, int]:
    """A load of prompts of 8 tokens and answers of 5, and the most rows that decoded in one step."""
    generator, engine = make_generator(rows=4, end_after=end_after)
    most = 0
    decode = engine.decode

    def counted(first_row: int, token_ids: np.ndarray) -> np.ndarray:
        nonlocal most
        most = max(most, len(token_ids))
        return decode(first_row, token_ids)

    engine.decode = counted  # type: ignore[method-assign]

    async def run() -> Driven:
        async with GenerationService(generator) as service:
            target = RowsTarget(service, 8, 5)
            prompts = target.prompts(count, np.random.default_rng(0))
            for prompt in prompts:
                prompt[prompt == 1] = 2  # which this engine can't compute
            if poison is not None:
                prompts[poison][3] = 1
            return await drive(target, ClosedLoop(concurrency), prompts)

    return asyncio.run(run()), most


def test_answers_have_a_time_for_each_token() -> None:
    found, most = driven(3, 7)
    assert most == 3 and len(found.outcomes) == 7
    for outcome in found.outcomes:
        assert isinstance(outcome, Answer)
        assert (outcome.prompt_tokens, outcome.completion_tokens, len(outcome.pieces)) == (8, 5, 5)
        assert outcome.start <= outcome.pieces[0] <= outcome.pieces[-1] <= outcome.end


def test_answers_do_not_end_before() -> None:
    """Or loads of one length would have answers of many: this engine ends each row behind its second new token."""
    found, _ = driven(2, 4, end_after=10)
    assert [outcome.completion_tokens for outcome in found.outcomes if isinstance(outcome, Answer)] == [5] * 4


def test_a_request_that_fails_is_counted_and_the_others_are_answered() -> None:
    found, _ = driven(2, 6, poison=2)
    kinds = [outcome.kind if isinstance(outcome, Failure) else None for outcome in found.outcomes]
    assert kinds == [None, None, FailureKind.ENGINE, None, None, None]


def test_prompts_are_token_ids_of_the_vocabulary_and_no_two_alike() -> None:
    generator, _ = make_generator()
    with GenerationService(generator) as service:
        prompts = RowsTarget(service, 50, 5).prompts(20, np.random.default_rng(0))
        ids = np.stack(prompts)
        assert ids.shape == (20, 50) and ids.min() >= 0 and VOCABULARY - 20 < ids.max() < VOCABULARY
        assert len({tuple(prompt[:5]) for prompt in prompts}) == 20


def test_a_service_that_is_closed_is_a_failure() -> None:
    generator, _ = make_generator()

    async def ask() -> Outcome:
        service = GenerationService(generator)
        target = RowsTarget(service, 8, 5)
        await service.aclose()
        return await target.ask(np.arange(2, 10), time.perf_counter())

    found = asyncio.run(ask())
    assert isinstance(found, Failure) and found.kind is FailureKind.ENGINE
