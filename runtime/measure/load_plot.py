"""Draws loads: throughput against latency, a point for each load."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qwen_aot.figures import scale, style, tidy
from qwen_aot.runtime.measure.summary import LoadReport, Percentiles

__all__ = ["draw"]

_PANEL_INCHES = 3.6
_PERCENTILES = ("p50", "p95", "p99")


def draw(reports: Sequence[LoadReport], title: str) -> Figure:
    """A figure of two panels over output tokens a second: time to the first token, and time between tokens.

    Args:
        reports: of closed loops, or of open ones; at least one has an answer. Those without one have no point.
        title: above all.
    """
    figure = Figure(figsize=(8, 2 * _PANEL_INCHES), layout="constrained")
    figure.suptitle(title, parse_math=False)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw(upper, reports, [report.first_token_seconds for report in reports], "first token, s")
    _draw(lower, reports, [report.between_tokens_seconds for report in reports], "between tokens, s")
    lower.set_xlabel("output tokens a second")
    upper.legend(frameon=False)
    return figure


def _draw(axes: Axes, reports: Sequence[LoadReport], latencies: Sequence[Percentiles | None], what: str) -> None:
    shown = [(report, latency) for report, latency in zip(reports, latencies, strict=True) if latency is not None]
    rates = [report.completion_tokens_per_second for report, _ in shown]
    for index, name in enumerate(_PERCENTILES):
        colour, mark = style(index)
        axes.plot(
            rates,
            [getattr(latency, name) for _, latency in shown],
            color=colour,
            marker=mark,
            markersize=5,
            label=name,
        )
    for report, latency in shown:
        axes.annotate(
            f"{report.concurrency}" if report.concurrency is not None else f"{report.rate:g}/s",
            (report.completion_tokens_per_second, latency.p99),
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
    if shown:
        scale(axes, [getattr(latency, name) for _, latency in shown for name in _PERCENTILES])
    axes.set_xlim(0, max(rates, default=1) * 1.1)
    axes.set_ylabel(what)
    tidy(axes)
