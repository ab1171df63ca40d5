"""What a user may ask of `quantize`, and the codes that each matrix gets by it."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_aot.engines.spec.quantize_spec import QuantizeSpec, bits_of, rounded_tensors
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.hf.config import parse
from qwen_aot.exporter.model.config import ModelConfig
from tests.checkpoints import tiny_config


def config_of(**changed: Any) -> ModelConfig:
    facts = tiny_config(**changed)
    return parse(facts.to_dict() | {"model_type": facts.model_type})


@pytest.mark.parametrize(
    ("given", "symmetric", "sensitive_bits"),
    [
        ({}, True, 8),
        ({"format": "gptq"}, True, 8),
        ({"format": "awq"}, False, 4),
        ({"bits": 8}, True, 8),
        ({"bits_per_weight": 4.5}, True, 4),
        ({"symmetric": False, "sensitive_bits": 4}, False, 4),
    ],
)
def test_defaults_follow_the_format(given: dict[str, Any], symmetric: bool, sensitive_bits: int) -> None:
    spec = QuantizeSpec(**given)
    assert (spec.symmetric, spec.sensitive_bits) == (symmetric, sensitive_bits)
    assert spec.request()["sensitive_bits"] == sensitive_bits  # what was decided is part of the request


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"algorithm": "best"}, "algorithm is 'best'; accepted: rtn, awq, gptq, awq-gptq, smoothquant"),
        ({"algorithm": "smoothquant", "format": "gptq"}, "format is gptq; accepted: compressed-tensors, or another"),
        (
            {"algorithm": "smoothquant", "bits": 4},
            "a scale a row, and bits is 4; accepted: 8, or another",
        ),
        ({"algorithm": "smoothquant", "group_size": 64}, "group_size is 64; accepted: nothing, or another algorithm"),
        ({"algorithm": "smoothquant", "symmetric": False}, "symmetric is False; accepted: True, or another algorithm"),
        ({"algorithm": "smoothquant", "sensitive_bits": 8}, "sensitive_bits is 8; accepted: nothing, or another"),
        (
            {"algorithm": "smoothquant", "table_bits": 8},
            "table_bits is 8; accepted: 16, or another",
        ),
        ({"algorithm": "smoothquant", "bits_per_weight": 8.0}, "bits_per_weight is 8.0; accepted: nothing, or another"),
        ({"algorithm": "smoothquant", "plain_share": 0.6}, "plain_share is 0.6; accepted: 0 to 0.5"),
        ({"algorithm": "smoothquant", "plain_share": float("nan")}, "plain_share is nan; accepted: 0 to 0.5"),
        ({"algorithm": "smoothquant", "tokens": 100}, "tokens is 100; it must be at least 256"),
        (
            {"plain_share": 0.1},
            "plain_share is of algorithms that round inputs too (smoothquant, gptq-fp8), and algo",
        ),
        ({"format": "awq", "bits": 8}, "bits is 8; accepted: 4, or another format"),
        ({"format": "awq", "symmetric": True}, "symmetric is True; accepted: False, or another format"),
        ({"format": "awq", "sensitive_bits": 8}, "sensitive_bits is 8; accepted: 4, or another format"),
        ({"format": "awq", "bits_per_weight": 5.0}, "bits_per_weight is 5.0; accepted: None, or another format"),
        ({"format": "awq", "table_bits": 4}, "format awq has no codes of an embedding, and table_bits is 4"),
        ({"format": "gptq", "table_bits": 8}, "format gptq has no codes of an embedding, and table_bits is 8"),
        ({"algorithm": "rtn", "bits_per_weight": 5.0}, "algorithm rtn looks at none; accepted: awq, gptq, awq-gptq"),
        ({"bits_per_weight": float("nan")}, "bits_per_weight is nan; accepted: more than 4"),
        ({"bits_per_weight": float("inf")}, "bits_per_weight is inf; accepted: more than 4"),
        ({"tokens": 100}, "tokens is 100; it must be at least 256"),
        ({"tokens": (1 << 24) + 1}, "tokens is 16777217; accepted: at most 16777216"),
        ({"sequence_length": 8}, "sequence_length is 8; it must be at least 16"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BuildError) as caught:
        QuantizeSpec(**given)
    assert said in str(caught.value)


def test_rounded_inputs_go_with_whole_rows_and_no_experts() -> None:
    config = config_of(moe={"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64})
    spec = QuantizeSpec(algorithm="smoothquant")
    assert (spec.bits, spec.symmetric, spec.plain_share, spec.measures) == (8, True, 0.15, True)
    assert not QuantizeSpec(algorithm="smoothquant", plain_share=0).measures
    forms = spec.forms(config)
    assert {name.split(".")[3] for name in forms} == {"self_attn", "mlp"}
    assert not any(".experts." in name for name in forms)
    assert any("shared_expert." in name for name in forms)
    widths = {tensor.name: tensor.shape[1] for tensor in rounded_tensors(config)}
    assert all(form.group_size == widths[name] and form.has_input_scale for name, form in forms.items())


def test_down_projections_have_the_sensitive_bits() -> None:
    forms = QuantizeSpec().forms(config_of(hidden=128, intermediate=192, layers=1))
    found = {name.removesuffix("_proj.weight").rpartition(".")[2]: form for name, form in forms.items()}
    assert {name: (form.bits, form.group_size) for name, form in found.items()} == {
        **dict.fromkeys(("q", "k", "v", "o", "gate", "up"), (4, 64)),
        "down": (8, 32),
    }
    assert not any(form.has_zero_points for form in forms.values())


def test_a_group_that_doesnt_divide_a_row_is_halved() -> None:
    config = config_of(hidden=96, intermediate=160, layers=1)
    forms = QuantizeSpec(group_size=128, sensitive_bits=4).forms(config)
    sizes = {name.removesuffix("_proj.weight").rpartition(".")[2]: form.group_size for name, form in forms.items()}
    assert (sizes["q"], sizes["down"]) == (32, 32)  # 96 and 160 are 32 times 3 and 5


def test_routers_and_gates_stay_numbers() -> None:
    config = config_of(moe={"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64})
    names = {tensor.name for tensor in rounded_tensors(config)}
    assert not any("mlp.gate.weight" in name or "shared_expert_gate" in name for name in names)
    assert sum(".experts." in name for name in names) == 2 * 4 * 3
    assert QuantizeSpec(group_size=16).forms(config).keys() == names


@pytest.mark.parametrize("tied", [True, False])
def test_tables(tied: bool) -> None:
    config = config_of(tied=tied)
    assert QuantizeSpec().table_forms(config) == {}
    forms = QuantizeSpec(table_bits=4, bits=8).table_forms(config)
    assert set(forms) == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    assert {(form.bits, form.group_size) for form in forms.values()} == {(4, 32)}


def test_rows_that_no_group_divides() -> None:
    with pytest.raises(BuildError, match=r"down_proj.weight has rows of 100, which no group of 16, 32, .* up to 32"):
        QuantizeSpec().forms(config_of(intermediate=100))


@pytest.mark.parametrize(("symmetric", "bits"), [(True, 4 + 16 / 32), (False, 4 + 20 / 32)])
def test_scales_and_zero_points_count(symmetric: bool, bits: float) -> None:
    spec = QuantizeSpec(group_size=32, symmetric=symmetric, sensitive_bits=4)
    for form in spec.forms(config_of()).values():
        assert bits_of(form, (10, 64)) == 10 * 64 * bits
