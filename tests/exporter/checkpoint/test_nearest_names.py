from __future__ import annotations

import pytest

from qwen_aot.exporter.checkpoint.nearest_names import nearest, nearest_clause

LAYER = "model.layers.3."
NAMES = [
    "model.embed_tokens.weight",
    "transformer.h.3.self_attn.q_proj.weight",
    "transformer.h.4.self_attn.q_proj.weight",
    "model.layers.3.self_attn.qkv_proj.weight",
    "model.layers.3.mlp.gate_up_proj.weight",
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{LAYER}self_attn.q_proj.weight", [NAMES[1], NAMES[3], NAMES[4]]),
        (f"{LAYER}mlp.gate_proj.weight", [NAMES[4], NAMES[3]]),
        ("lm_head.weight", []),
        ("model.layers.9.self_attn.q_proj.weight", []),
        ("model.embed_tokens.weight", []),  # itself
        ("embed_tokens.weight", ["model.embed_tokens.weight"]),
        (f"{LAYER}mlp.experts.7.gate_up_proj.weight", [NAMES[4], NAMES[3]]),  # all experts in one tensor
    ],
)
def test_the_nearest_of_the_same_layer(name: str, expected: list[str]) -> None:
    found = nearest(name, NAMES)
    assert found[:2] == expected[:2]
    assert set(found) <= {*expected, *NAMES[3:]}


def test_the_clause_of_a_message() -> None:
    assert nearest_clause("embed_tokens.weight", NAMES) == "; nearest by name: model.embed_tokens.weight"
    assert nearest_clause("x", []) == ""


def test_many_names_take_no_time() -> None:
    assert nearest("a.weight", (f"b{number}.weight" for number in range(100_000))) == []
