"""What is counted, as Prometheus' own parser reads it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen_aot.runtime.generation import speculation
from qwen_aot.runtime.server.metrics import _Histogram
from tests.runtime.server.servers import App

# Names that vLLM's server has, which its dashboards ask for.
# Source: https://docs.vllm.ai/en/stable/usage/metrics.html
VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:request_success",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
}


# Of bundles that can check drafts.
DRAFTS = {
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:spec_decode_num_accepted_tokens_per_pos",
}


def samples(app: App) -> dict[str, float]:
    """Values by name, with the labels that tell them apart."""
    response = app.ask("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("engine", "model_name")}
            assert sample.labels.get("model_name", "toy") in ("toy", "")
            found[sample.name + "".join(f" {value}" for _, value in sorted(labels.items()))] = sample.value
    return found


def test_names() -> None:
    with App() as app:
        families = {family.name for family in text_string_to_metric_families(app.ask("GET", "/metrics").text)}
        assert families == VLLM | {"http_requests", "qwen_aot:ready"}


def test_counts() -> None:
    with App() as app:
        app.complete({"n": 2, "max_tokens": 6})
        app.chat({"messages": [{"role": "user", "content": "\x01"}]})
        app.complete({"stream": True, "max_tokens": 4})
        app.complete({"x": 1})
        app.ask("BREW", "/coffee?secret=1")
        app.ask("GET", "/v1/models/toy")
        found = samples(app)
    assert found["vllm:generation_tokens_total"] == 6 + 6 + 4
    assert found["vllm:request_success_total length"] == 3
    assert found["vllm:request_success_total error"] == 1
    assert found["vllm:request_success_total abort"] == found["vllm:request_success_total stop"] == 0
    assert found["vllm:request_generation_tokens_sum"] == 16 and found["vllm:request_generation_tokens_count"] == 3
    assert found["vllm:inter_token_latency_seconds_count"] == 5 + 5 + 3
    assert found["vllm:e2e_request_latency_seconds_count"] == 3
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert found["http_requests_total /v1/completions POST 200"] == 2
    assert found["http_requests_total /v1/completions POST 400"] == 1
    assert found["http_requests_total other other 404"] == 1
    assert found["http_requests_total /v1/models/{model} GET 200"] == 1
    assert not any("secret" in name or "coffee" in name for name in found)


def test_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an answer that repeats itself, so that what is drafted is right."""
    monkeypatch.setattr(speculation.StepCosts, "ratios", lambda costs: [1.0] * len(costs._seconds))
    script, body = "round and round ", {"max_tokens": 40}
    with App(logits_rows=4, script=script * 3) as app:
        families = {family.name for family in text_string_to_metric_families(app.ask("GET", "/metrics").text)}
        assert families == VLLM | DRAFTS | {"http_requests", "qwen_aot:ready"}
        text = app.chat(body).json()["choices"][0]["message"]["content"]
        found = samples(app)
    with App(script=script * 3) as plain:
        assert text == plain.chat(body).json()["choices"][0]["message"]["content"] == (script * 3)[:40]
    name = "vllm:spec_decode_num"
    assert found[f"{name}_drafts_total"] >= 4
    assert found[f"{name}_draft_tokens_total"] >= found[f"{name}_accepted_tokens_total"] >= 12
    places = [found[f"{name}_accepted_tokens_per_pos_total {place}"] for place in range(3)]
    assert sum(places) == found[f"{name}_accepted_tokens_total"]
    assert places == sorted(places, reverse=True)
    assert found["vllm:generation_tokens_total"] == 40


def test_before_the_model_is_there() -> None:
    with App(is_loaded=False) as app:
        assert samples(app)["qwen_aot:ready"] == 0
        app.state.start(app.generator)
        assert samples(app)["qwen_aot:ready"] == 1


def test_no_label_is_a_clients() -> None:
    with App() as app:
        for number in range(50):
            app.ask("GET", f"/path-{number}")
            app.ask("GET", f"/v1/models/model-{number}")
            app.ask(f"METHOD{number}", "/health")
        assert sum("http_requests_total" in name for name in samples(app)) <= 6


@pytest.mark.parametrize(("value", "place"), [(0.5, 0), (1.0, 0), (1.5, 1), (2.0, 1), (9.0, 2)])
def test_a_histogram(value: float, place: int) -> None:
    histogram = _Histogram((1, 2))
    histogram.observe(value, 3)
    buckets, total = histogram.buckets()
    assert [bound for bound, _ in buckets] == ["1.0", "2.0", "+Inf"]
    assert [count for _, count in buckets] == [3.0 if index >= place else 0.0 for index in range(3)]
    assert total == 3 * value
