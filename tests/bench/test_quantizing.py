"""The benchmark of quantizing runs the real job, and its sums are right."""

from __future__ import annotations

import dataclasses

import pytest

from qwen_aot.engines.spec.quantize_spec import QuantizeSpec
from qwen_aot.exporter.model.variants import VARIANTS
from tests.bench import quantizing


@pytest.mark.parametrize("algorithm", ["awq-gptq", "smoothquant"])
def test_some_layers_are_quantized_and_the_whole_is_worked_out(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(
        next(iter(VARIANTS.values())),
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=96,
        num_hidden_layers=10,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
    )
    monkeypatch.setattr(quantizing, "VARIANTS", {"small": small})
    found = quantizing.measured("small", 2, QuantizeSpec(algorithm=algorithm, tokens=512), threads=1)
    working = found["seconds"]["round"] + found["seconds"].get("measure", 0.0)
    assert ("measure" in found["seconds"]) == (algorithm == "smoothquant")
    assert found["seconds_a_layer"] == pytest.approx(working / 2)
    assert found["hours_for_all_layers"] == pytest.approx(working / 2 * 10 / 3600)
    assert (found["layers"], found["tokens"]) == (2, 512)
    assert found["peak_memory_bytes"] > 1 << 20
