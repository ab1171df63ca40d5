"""What is told of a load, of outcomes whose times are known."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.measure.drive import ClosedLoop, Driven, OpenLoop
from qwen_aot.runtime.measure.outcome import Answer, Failure, FailureKind
from qwen_aot.runtime.measure.summary import Percentiles, summarize

# First text 1 s, 3 pieces 0.2 and 0.4 s apart which are 4 tokens, and 0.1 s to the end.
LONG = Answer(10.0, (11.0, 11.2, 11.6), 11.7, 20, 4)
SHORT = Answer(10.5, (12.5,), 12.5, 30, 1)
FAILURES = (
    Failure(FailureKind.STATUS, "first", 10.0, 10.1, 429),
    Failure(FailureKind.STATUS, "second", 10.0, 10.1, 429),
    Failure(FailureKind.STATUS, "other", 10.0, 10.1, 500),
    Failure(FailureKind.TIMEOUT, "late", 10.0, 15.0),
)


def test_every_figure() -> None:
    report = summarize(ClosedLoop(2), Driven((LONG, FAILURES[0], SHORT, *FAILURES[1:]), 5.0, 0.25, 0.001), 4)
    assert (report.concurrency, report.rate) == (2, None)
    assert (report.requests, report.answered, report.short_answers) == (6, 2, 1)
    assert report.failures == {"status 429": 2, "status 500": 1, "timeout": 1}
    assert report.messages == {"status 429": "first", "status 500": "other", "timeout": "late"}
    assert (report.prompt_tokens, report.completion_tokens) == (50, 5)
    assert (report.completion_tokens_per_second, report.requests_per_second) == (1.0, 0.4)
    assert (report.seconds, report.cpu_seconds, report.late_seconds) == (5.0, 0.25, 0.001)
    assert dataclasses.astuple(report.first_token_seconds) == pytest.approx((1.5, 1.95, 1.99, 2.0))  # type: ignore[arg-type]
    assert dataclasses.astuple(report.between_tokens_seconds) == pytest.approx((0.2,) * 4)  # type: ignore[arg-type]
    assert dataclasses.astuple(report.gap_seconds) == pytest.approx((0.3, 0.39, 0.398, 0.4))  # type: ignore[arg-type]
    assert dataclasses.astuple(report.end_to_end_seconds) == pytest.approx((1.85, 1.985, 1.997, 2.0))  # type: ignore[arg-type]


def test_a_load_without_answers_has_no_latencies_and_hides_no_failure() -> None:
    report = summarize(OpenLoop(2.5, 0), Driven(FAILURES, 5.0, 0.25, 0.0), 4)
    assert (report.concurrency, report.rate, report.answered) == (None, 2.5, 0)
    assert sum(report.failures.values()) == report.requests == 4
    assert report.completion_tokens_per_second == report.requests_per_second == 0
    assert report.first_token_seconds is report.between_tokens_seconds is report.gap_seconds is None
    assert report.end_to_end_seconds is None


def test_the_report_is_plain_json() -> None:
    values = summarize(ClosedLoop(1), Driven((LONG,), 5.0, 0.25, 0.0), 4).to_json()
    assert values["first_token_seconds"] == {"p50": 1.0, "p95": 1.0, "p99": 1.0, "max": 1.0}


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    found = Percentiles.of(values)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert found is not None
    assert (found.p50, found.p95, found.p99) == pytest.approx((cuts[49], cuts[94], cuts[98]))
    assert found.max == max(values)
