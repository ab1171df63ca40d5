from __future__ import annotations

import pytest

from qwen_aot.exporter.checkpoint.names import CANONICAL, Place, TensorNames
from qwen_aot.exporter.model.tensors import Role

NAMES = TensorNames(
    {
        Role.EMBEDDING: "tokens",
        Role.GATE: "h.{layer}.mlp.w1",
        Role.EXPERT_GATE: "h.{layer}.experts.{expert}.w1",
        Role.EXPERT_DOWN: "h.{layer}.all_experts.w2",
        Role.UP: "h.{layer}.mlp.0.w.{expert}",
    }
)


@pytest.mark.parametrize(
    ("stored", "place"),
    [
        ("tokens", Place(Role.EMBEDDING)),
        ("h.7.mlp.w1", Place(Role.GATE, 7)),
        ("h.11.experts.59.w1", Place(Role.EXPERT_GATE, 11, 59)),
        ("h.3.all_experts.w2", Place(Role.EXPERT_DOWN, 3)),
        ("h.3.mlp.0.w.4", Place(Role.UP, 3, 4)),
        ("h.3.mlp.1.w.4", None),
        ("h.07.mlp.w1", None),
        pytest.param(f"h.{'9' * 5000}.mlp.w1", None, id="5000 digits"),
        ("h.x.mlp.w1", None),
        ("h.{layer}.mlp.w1", None),
        ("h.#.mlp.w1", None),
        ("h.1.mlp.w2", None),
        ("h.1.mlp.w1.bias", None),
        ("", None),
    ],
)
def test_what_a_stored_name_is(stored: str, place: Place | None) -> None:
    assert NAMES.find(stored) == place


def test_the_name_by_which_readers_give_it() -> None:
    found = NAMES.find("h.11.experts.59.w1")
    assert found is not None
    assert found.name == "model.layers.11.mlp.experts.59.gate_proj.weight"


def test_every_role_is_found_by_transformers_name() -> None:
    for role in Role:
        layer, expert = (3 if "{layer}" in role.template else None), (5 if "{expert}" in role.template else None)
        assert CANONICAL.find(role.tensor_name(layer, expert)) == Place(role, layer, expert)
