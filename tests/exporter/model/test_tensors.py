"""The table of tensors against transformers' own state dicts, and against a graph's initializers written out."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest

from qwen_aot.exporter.checkpoint.hf.config import parse
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import (
    INITIALIZERS,
    SENSITIVE,
    Role,
    WeightClass,
    checkpoint_tensors,
    layer_kinds,
    layer_parameters,
    num_parameters,
    outer_parameters,
    placed_parameters,
    tensor_shapes,
    weight_class_of,
)
from tests.checkpoints import tiny_config, tiny_model
from tests.gguf_files import hugging_face_state

KINDS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"heads": 6, "kv_heads": 2, "hidden": 96},
    "mqa-tied": {"kv_heads": 1, "tied": True},
    "head_dim": {"head_dim": 32, "kv_heads": 2},
    "one-layer": {"layers": 1, "vocab": 97},
    "moe": {"moe": {}},
    "moe-tied": {"moe": {}, "tied": True},
    "moe-mixed": {"moe": {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, "layers": 6},
    "moe-last-dense": {"moe": {"mlp_only_layers": [2]}, "layers": 3},
    "moe-no-bias": {"moe": {"qkv_bias": False}},
}


def config_of(kind: str) -> ModelConfig:
    return parse(tiny_config(**KINDS[kind]).to_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_what_transformers_saves(kind: str) -> None:
    state = hugging_face_state(tiny_model(tiny_config(**KINDS[kind])))
    tensors = list(checkpoint_tensors(config_of(kind)))
    assert {tensor.name: tensor.shape for tensor in tensors} == {name: array.shape for name, array in state.items()}
    assert len(tensors) == len(state)
    assert num_parameters(config_of(kind)) == sum(math.prod(array.shape) for array in state.values())
    for tensor in tensors:
        digits = [int(part) for part in tensor.name.split(".") if part.isdigit()]
        assert [index for index in (tensor.layer, tensor.expert) if index is not None] == digits


def test_a_shared_expert_of_size_0_has_no_tensors() -> None:
    config = config_of("moe")
    assert config.moe is not None
    without = dataclasses.replace(config, moe=dataclasses.replace(config.moe, shared_expert_intermediate_size=0))
    gone = set(tensor_shapes(config)) - set(tensor_shapes(without))
    assert gone == {name for name in tensor_shapes(config) if "shared_expert" in name} != set()


def test_the_graphs_initializers() -> None:
    """Layer 0 has experts, layer 1 none; 4 heads of 16, 2 of keys and values; 4 experts of 24, a shared one of 40."""
    shape = {"moe": {"mlp_only_layers": [1]}, "kv_heads": 2, "layers": 2}
    config = parse(tiny_config(**shape).to_dict())
    attention = {
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "self_attn.qkv_proj.weight": (128, 64),
        "self_attn.qkv_proj.bias": (128,),
        "self_attn.o_proj.weight": (64, 64),
    }
    experts = {
        "mlp.gate.weight": (4, 64),
        "mlp.experts_gate_up": (4, 48, 64),
        "mlp.experts_down": (4, 64, 24),
        "mlp.shared_expert.gate_up_proj.weight": (80, 64),
        "mlp.shared_expert.down_proj.weight": (64, 40),
        "mlp.shared_expert_gate.weight": (1, 64),
    }
    dense = {"mlp.gate_up_proj.weight": (192, 64), "mlp.down_proj.weight": (64, 96)}
    ends = {"model.embed_tokens.weight": (131, 64), "model.norm.weight": (64,), "lm_head.weight": (131, 64)}
    want = (
        list(ends.items())
        + [(f"model.layers.0.{name}", shape) for name, shape in (attention | experts).items()]
        + [(f"model.layers.1.{name}", shape) for name, shape in (attention | dense).items()]
    )
    assert [(parameter.name(layer), parameter.shape) for parameter, layer in placed_parameters(config)] == want


def test_the_order_in_which_tensors_are_stacked() -> None:
    of = {parameter.local_name: parameter for parameter in layer_parameters(config_of("moe"), is_sparse=True)}
    layer = "model.layers.7."
    assert [tensor.name for tensor in of["self_attn.qkv_proj.weight"].tensors(7)] == [
        f"{layer}self_attn.{part}_proj.weight" for part in "qkv"
    ]
    assert [tensor.name for tensor in of["mlp.experts_gate_up"].tensors(7)] == [
        f"{layer}mlp.experts.{expert}.{part}_proj.weight" for expert in range(4) for part in ("gate", "up")
    ]
    assert [tensor.name for tensor in of["mlp.shared_expert.gate_up_proj.weight"].tensors(7)] == [
        f"{layer}mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up")
    ]
    assert [tensor.name for tensor in of["mlp.experts_down"].tensors(7)] == [
        f"{layer}mlp.experts.{expert}.down_proj.weight" for expert in range(4)
    ]
    (gate_up,) = (p for p in layer_parameters(config_of("mha"), is_sparse=False) if "gate_up" in p.template)
    assert [t.name for t in gate_up.tensors(7)] == [f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up")]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers_are_all_layers_once(kind: str) -> None:
    config = config_of(kind)
    grouped = Counter[str]()
    for layers, parameters in ((None, outer_parameters(config)), *layer_kinds(config)):
        grouped.update(p.name(layer) for p in parameters for layer in (layers if layers is not None else (None,)))
    assert grouped == Counter(parameter.name(layer) for parameter, layer in placed_parameters(config))
    assert set(grouped.values()) == {1}


def test_every_role_is_in_one_initializer_with_others_of_its_class() -> None:
    assert Counter(role for roles in INITIALIZERS.values() for role in roles) == Counter(Role)
    for roles in INITIALIZERS.values():
        assert len({role.weight_class for role in roles}) == 1


CLASSES = {
    "model.embed_tokens.weight": WeightClass.EMBEDDING,
    "lm_head.weight": WeightClass.HEAD,
    "model.norm.weight": WeightClass.NORM,
    "model.layers.0.input_layernorm.weight": WeightClass.NORM,
    "model.layers.79.post_attention_layernorm.weight": WeightClass.NORM,
    "model.layers.3.self_attn.qkv_proj.weight": WeightClass.PROJECTION,
    "model.layers.3.self_attn.qkv_proj.bias": WeightClass.BIAS,
    "model.layers.3.self_attn.o_proj.weight": WeightClass.PROJECTION,
    "model.layers.3.mlp.gate_up_proj.weight": WeightClass.PROJECTION,
    "model.layers.3.mlp.down_proj.weight": WeightClass.DOWN,
    "model.layers.3.mlp.gate.weight": WeightClass.DECIDING,
    "model.layers.3.mlp.experts_gate_up": WeightClass.EXPERT,
    "model.layers.3.mlp.experts_down": WeightClass.EXPERT,
    "model.layers.3.mlp.shared_expert.gate_up_proj.weight": WeightClass.PROJECTION,
    "model.layers.3.mlp.shared_expert.down_proj.weight": WeightClass.DOWN,
    "model.layers.3.mlp.shared_expert_gate.weight": WeightClass.DECIDING,
    "model.rotary.cos": None,
    "model.layers.x.mlp.down_proj.weight": None,
    "mlp.down_proj.weight": None,
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_of_an_initializer(name: str) -> None:
    assert weight_class_of(name) is CLASSES[name]


def test_sensitive_are_the_embedding_the_head_and_down_projections_but_not_those_of_experts() -> None:
    sensitive = {name for name, weight_class in CLASSES.items() if weight_class in SENSITIVE}
    assert sensitive == {
        name for name in CLASSES if name.endswith(("embed_tokens.weight", "lm_head.weight", "down_proj.weight"))
    } - {"model.layers.x.mlp.down_proj.weight", "mlp.down_proj.weight"}
