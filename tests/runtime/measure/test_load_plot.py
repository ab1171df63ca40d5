"""The plot of loads: a point for each, with its throughput and its latencies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_aot.figures import render
from qwen_aot.runtime.measure.drive import ClosedLoop, Driven
from qwen_aot.runtime.measure.load_plot import draw
from qwen_aot.runtime.measure.outcome import Answer
from qwen_aot.runtime.measure.summary import LoadReport, Percentiles, summarize

ONE = replace(
    summarize(ClosedLoop(1), Driven((Answer(0.0, (1.0, 1.5), 1.5, 9, 2),), 2.0, 0.1, 0.0), 2),
    first_token_seconds=Percentiles(0.1, 0.2, 0.3, 0.4),
    between_tokens_seconds=Percentiles(0.01, 0.02, 0.03, 0.04),
    completion_tokens_per_second=50.0,
)
EIGHT = replace(
    ONE,
    concurrency=8,
    first_token_seconds=Percentiles(0.5, 0.6, 0.7, 0.8),
    between_tokens_seconds=Percentiles(0.05, 0.06, 0.07, 0.08),
    completion_tokens_per_second=160.0,
)
FAILED = replace(ONE, concurrency=16, first_token_seconds=None, between_tokens_seconds=None)


def test_points_are_throughput_and_latency() -> None:
    upper, lower = draw([ONE, EIGHT], "a title").axes
    found = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in upper.lines}
    assert found == {
        "p50": ([50.0, 160.0], [0.1, 0.5]),
        "p95": ([50.0, 160.0], [0.2, 0.6]),
        "p99": ([50.0, 160.0], [0.3, 0.7]),
    }
    assert [list(line.get_ydata()) for line in lower.lines] == [[0.01, 0.05], [0.02, 0.06], [0.03, 0.07]]
    assert [text.get_text() for text in upper.texts] == ["1", "8"]
    assert (upper.get_ylabel(), lower.get_xlabel()) == ("first token, s", "output tokens a second")


def test_a_load_without_answers_has_no_point() -> None:
    for axes in draw([FAILED, EIGHT], "a title").axes:
        assert [text.get_text() for text in axes.texts] == ["8"]
        assert [len(line.get_xdata()) for line in axes.lines] == [1, 1, 1]


def test_rates_are_named_as_such() -> None:
    rates = [replace(ONE, concurrency=None, rate=0.5), replace(EIGHT, concurrency=None, rate=12.0)]
    assert [text.get_text() for text in draw(rates, "").axes[0].texts] == ["0.5/s", "12/s"]


@pytest.mark.parametrize("reports", [[ONE], [ONE, EIGHT], [replace(ONE, between_tokens_seconds=None)]])
def test_it_can_be_drawn(reports: list[LoadReport]) -> None:
    """Also where answers have one token each, and nothing between."""
    assert render(draw(reports, "$x_1$ 中"), ".svg") == render(draw(reports, "$x_1$ 中"), ".svg")
