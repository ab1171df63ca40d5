"""Metrics: counts and times for Prometheus, under the names of vLLM's server, so that its dashboards show them.

Labels have values from a fixed set: nothing that a client sends becomes one.
Source: https://docs.vllm.ai/en/stable/usage/metrics.html
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from qwen_aot.runtime.generation.handle import RequestHandle
from qwen_aot.runtime.generation.request import Completion, FinishReason
from qwen_aot.runtime.generation.speculation import SpeculationStatistics
from qwen_aot.runtime.server.state import Model, Phase, ServerState

__all__ = ["METHODS", "Metrics"]

METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST"})
_LABELS = ("model_name", "engine")
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class _Histogram:
    """Values in buckets; `times` as if it had come so often."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """The cumulative counts by upper bound, and the sum."""
        total, found = 0, []
        for bound, count in zip([*map(str, map(float, self._bounds)), "+Inf"], self._counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found, self._sum


class Metrics(Collector):
    """What a server counts. One event loop calls it."""

    def __init__(self, state: ServerState) -> None:
        """Counts from 0 on."""
        self._state = state
        self._histograms = {
            "vllm:time_to_first_token_seconds": ("From a request's arrival to its first token.", _Histogram(_FIRST)),
            "vllm:inter_token_latency_seconds": (
                "Between tokens: the mean of an answer, once for each of its tokens but the first.",
                _Histogram(_BETWEEN),
            ),
            "vllm:e2e_request_latency_seconds": ("From a request's arrival to its end.", _Histogram(_WHOLE)),
            "vllm:request_prefill_time_seconds": ("In the prefill steps of a request.", _Histogram(_WHOLE)),
            "vllm:request_decode_time_seconds": ("From the first token of an answer to its last.", _Histogram(_WHOLE)),
            "vllm:request_prompt_tokens": ("Tokens of a request's prompts.", _Histogram(_TOKENS)),
            "vllm:request_generation_tokens": ("Tokens of an answer.", _Histogram(_TOKENS)),
        }
        self._reasons: Counter[str] = Counter()
        self._responses: Counter[tuple[str, str, str]] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def count_response(self, handler: str, method: str, status: int) -> None:
        """Counts a response.

        Args:
            handler: a path of the server's own, or "other".
            method: any; unknown ones count as "other".
            status: of HTTP; 499 where the client had gone.
        """
        self._responses[handler, method if method in METHODS else "other", str(status)] += 1

    def count(self, handles: Sequence[RequestHandle], completions: Sequence[Completion], seconds: float) -> None:
        """Counts a request that has ended, by its answers.

        Args:
            handles: of its prompts.
            completions: those that it had; the rest was cancelled.
            seconds: from its arrival to now.
        """
        for completion in completions:
            reason = completion.finish_reason
            self._reasons[_REASONS[reason]] += 1
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._observe_answer(completion)
        missing = sum(1 if handle.request.config is None else handle.request.config.n for handle in handles)
        self._reasons["abort"] += missing - len(completions)
        self._observe("vllm:e2e_request_latency_seconds", seconds)
        self._observe("vllm:request_prompt_tokens", sum(len(handle.prompt_ids) for handle in handles))

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        responses = CounterMetricFamily(
            "http_requests", "Responses by path, method and status.", labels=("handler", "method", "status")
        )
        for labels, count in sorted(self._responses.items()):
            responses.add_metric(labels, count)
        yield responses
        yield self._gauge("qwen_aot:ready", "Whether requests are taken.", self._state.phase is Phase.READY)
        model = self._state.loaded
        if model is not None:
            yield from self._of_model(model)

    def _of_model(self, model: Model) -> Iterator[Metric]:
        now = model.service.statistics()
        yield self._gauge("vllm:num_requests_running", "Answers in rows of the engine.", now.running)
        yield self._gauge("vllm:num_requests_waiting", "Answers that wait for a row.", now.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Rows in use, as a share of 1.", now.running / model.rows)
        yield self._counter("vllm:prompt_tokens", "Tokens of ended requests' prompts.", now.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", now.generated_tokens)
        asked = now.prompt_tokens if self._state.settings.has_prefix_cache else 0
        yield self._counter("vllm:prefix_cache_queries", "Tokens looked for in the cache.", asked)
        yield self._counter("vllm:prefix_cache_hits", "Tokens found there.", now.cached_tokens)
        if now.speculation is not None:
            yield from self._of_drafts(now.speculation)
        ended = CounterMetricFamily(
            "vllm:request_success", "Answers by how they ended.", labels=(*_LABELS, "finished_reason")
        )
        for reason in _REASONS.values():
            ended.add_metric((*self._label_values(), reason), self._reasons[reason])
        yield ended
        for name, (meaning, histogram) in self._histograms.items():
            family = HistogramMetricFamily(name, meaning, labels=_LABELS)
            family.add_metric(self._label_values(), *histogram.buckets())
            yield family

    def _of_drafts(self, found: SpeculationStatistics) -> Iterator[Metric]:
        yield self._counter("vllm:spec_decode_num_drafts", "Drafts that were checked.", found.drafts)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Tokens in them.", found.draft_tokens)
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Those that were right.", found.accepted_tokens)
        places = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Those that were right, by their place in the draft.",
            labels=(*_LABELS, "position"),
        )
        for place, count in enumerate(found.accepted_by_place):
            places.add_metric((*self._label_values(), str(place)), count)
        yield places

    def _observe_answer(self, completion: Completion) -> None:
        timings, tokens = completion.timings, len(completion.token_ids)
        self._observe("vllm:time_to_first_token_seconds", timings.first_token)
        self._observe("vllm:request_prefill_time_seconds", timings.prefill)
        self._observe("vllm:request_decode_time_seconds", timings.decode)
        self._observe("vllm:request_generation_tokens", tokens)
        if tokens > 1:
            self._histograms["vllm:inter_token_latency_seconds"][1].observe(timings.decode / (tokens - 1), tokens - 1)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name][1].observe(value)

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        return _with(GaugeMetricFamily(name, meaning, labels=_LABELS), self._label_values(), value)

    def _counter(self, name: str, meaning: str, value: float) -> Metric:
        return _with(CounterMetricFamily(name, meaning, labels=_LABELS), self._label_values(), value)

    def _label_values(self) -> tuple[str, str]:
        model = self._state.loaded
        return ("" if model is None else model.names[0]), "0"


def _with(family: GaugeMetricFamily | CounterMetricFamily, labels: Iterable[str], value: float) -> Metric:
    family.add_metric(list(labels), value)
    return family
