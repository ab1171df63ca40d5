"""What is told of a load: throughput, percentiles of latencies, and failures by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_aot.runtime.measure.drive import ClosedLoop, Driven, Load
from qwen_aot.runtime.measure.outcome import Answer, Failure

__all__ = ["LoadReport", "Percentiles", "summarize"]


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a measure in seconds; between two values the line from one to the other is taken, as numpy does."""

    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles | None:
        """Of at least one value; None: there is none."""
        array = np.fromiter(values, np.float64)
        if not array.size:
            return None
        p50, p95, p99 = np.percentile(array, (50, 95, 99)).tolist()
        return cls(p50, p95, p99, float(array.max()))


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One load. What failed counts in `failures` alone.

    Attributes:
        concurrency: clients of a closed loop; None: it is an open one.
        rate: requests a second of an open loop; None: it is a closed one.
        requests: sent.
        answered: whole.
        failures: number by kind.
        messages: the first of each kind.
        short_answers: that ended before the tokens asked for.
        seconds: from the first request's start to the last one's end.
        prompt_tokens, completion_tokens: of all answers.
        completion_tokens_per_second, requests_per_second: of answers, over `seconds`.
        first_token_seconds: from a request's start to its first text; None, as below: there is nothing to tell.
        between_tokens_seconds: of each answer the mean time for a token behind its first.
        gap_seconds: between pieces of text, those of all answers together.
        end_to_end_seconds: from a request's start to its end.
        cpu_seconds: of this process.
        late_seconds: see `Driven`.
    """

    concurrency: int | None
    rate: float | None
    requests: int
    answered: int
    failures: dict[str, int]
    messages: dict[str, str]
    short_answers: int
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    completion_tokens_per_second: float
    requests_per_second: float
    first_token_seconds: Percentiles | None
    between_tokens_seconds: Percentiles | None
    gap_seconds: Percentiles | None
    end_to_end_seconds: Percentiles | None
    cpu_seconds: float
    late_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def summarize(load: Load, driven: Driven, gen_tokens: int) -> LoadReport:
    """What a load shows.

    Args:
        load: that was driven.
        driven: with at least one outcome.
        gen_tokens: that each request asked for.
    """
    answers = [outcome for outcome in driven.outcomes if isinstance(outcome, Answer)]
    failures = [outcome for outcome in driven.outcomes if isinstance(outcome, Failure)]
    tokens = sum(answer.completion_tokens for answer in answers)
    return LoadReport(
        concurrency=load.concurrency if isinstance(load, ClosedLoop) else None,
        rate=None if isinstance(load, ClosedLoop) else load.rate,
        requests=len(driven.outcomes),
        answered=len(answers),
        failures=dict(Counter(failure.name for failure in failures)),
        messages={failure.name: failure.message for failure in reversed(failures)},
        short_answers=sum(answer.completion_tokens < gen_tokens for answer in answers),
        seconds=driven.seconds,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=tokens,
        completion_tokens_per_second=tokens / driven.seconds,
        requests_per_second=len(answers) / driven.seconds,
        first_token_seconds=Percentiles.of(answer.first_token for answer in answers),
        between_tokens_seconds=Percentiles.of(
            each for answer in answers if (each := answer.between_tokens) is not None
        ),
        gap_seconds=Percentiles.of(gap for answer in answers for gap in answer.gaps),
        end_to_end_seconds=Percentiles.of(answer.end_to_end for answer in answers),
        cpu_seconds=driven.cpu_seconds,
        late_seconds=driven.late_seconds,
    )
