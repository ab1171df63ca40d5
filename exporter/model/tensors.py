"""The one table of a decoder's weights: what a checkpoint holds, and which of it makes each initializer of the graph.

Names and shapes of checkpoint tensors, recipes, the traced modules' parameters, parameter counts, the choice of what is
quantized how, and footprints all derive from it. A new weight is a row of `Role`, its place in `INITIALIZERS` and its
shape in `_shapes`.
"""

from __future__ import annotations

import enum
import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qwen_aot.exporter.model.config import ModelConfig

Shape = tuple[int, ...]


class WeightClass(enum.Enum):
    """How a weight may be stored; the members of one class are stored alike."""

    NORM = "norm"  # fp32 whatever the compute type is
    BIAS = "bias"  # compute type
    DECIDING = "deciding"  # routers and gates: few bytes that decide much, so always the compute type
    EMBEDDING = "embedding"
    HEAD = "head"
    PROJECTION = "projection"
    DOWN = "down"  # of dense MLPs and shared experts
    EXPERT = "expert"  # every matrix of routed experts


# Matrices whose rounding costs a trained model most (docs/performance.md). A tied head is the embedding.
SENSITIVE = frozenset({WeightClass.EMBEDDING, WeightClass.HEAD, WeightClass.DOWN})


class Role(enum.Enum):
    """What a checkpoint tensor is to the decoder: its class, and the name by which readers give it.

    That name is the one in transformers' classes of `exporter.model.model_types`; a reader of files with other names
    translates them (`exporter.checkpoint.names`).
    """

    EMBEDDING = (WeightClass.EMBEDDING, "model.embed_tokens.weight")
    FINAL_NORM = (WeightClass.NORM, "model.norm.weight")
    HEAD = (WeightClass.HEAD, "lm_head.weight")
    INPUT_NORM = (WeightClass.NORM, "model.layers.{layer}.input_layernorm.weight")
    POST_ATTENTION_NORM = (WeightClass.NORM, "model.layers.{layer}.post_attention_layernorm.weight")
    QUERY = (WeightClass.PROJECTION, "model.layers.{layer}.self_attn.q_proj.weight")
    KEY = (WeightClass.PROJECTION, "model.layers.{layer}.self_attn.k_proj.weight")
    VALUE = (WeightClass.PROJECTION, "model.layers.{layer}.self_attn.v_proj.weight")
    QUERY_BIAS = (WeightClass.BIAS, "model.layers.{layer}.self_attn.q_proj.bias")
    KEY_BIAS = (WeightClass.BIAS, "model.layers.{layer}.self_attn.k_proj.bias")
    VALUE_BIAS = (WeightClass.BIAS, "model.layers.{layer}.self_attn.v_proj.bias")
    QUERY_NORM = (WeightClass.NORM, "model.layers.{layer}.self_attn.q_norm.weight")
    KEY_NORM = (WeightClass.NORM, "model.layers.{layer}.self_attn.k_norm.weight")
    OUTPUT = (WeightClass.PROJECTION, "model.layers.{layer}.self_attn.o_proj.weight")
    GATE = (WeightClass.PROJECTION, "model.layers.{layer}.mlp.gate_proj.weight")
    UP = (WeightClass.PROJECTION, "model.layers.{layer}.mlp.up_proj.weight")
    DOWN = (WeightClass.DOWN, "model.layers.{layer}.mlp.down_proj.weight")
    ROUTER = (WeightClass.DECIDING, "model.layers.{layer}.mlp.gate.weight")
    EXPERT_GATE = (WeightClass.EXPERT, "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight")
    EXPERT_UP = (WeightClass.EXPERT, "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight")
    EXPERT_DOWN = (WeightClass.EXPERT, "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight")
    SHARED_GATE = (WeightClass.PROJECTION, "model.layers.{layer}.mlp.shared_expert.gate_proj.weight")
    SHARED_UP = (WeightClass.PROJECTION, "model.layers.{layer}.mlp.shared_expert.up_proj.weight")
    SHARED_DOWN = (WeightClass.DOWN, "model.layers.{layer}.mlp.shared_expert.down_proj.weight")
    SHARED_EXPERT_GATE = (WeightClass.DECIDING, "model.layers.{layer}.mlp.shared_expert_gate.weight")

    def __init__(self, weight_class: WeightClass, template: str) -> None:
        self.weight_class = weight_class
        self.template = template

    def tensor_name(self, layer: int | None = None, expert: int | None = None) -> str:
        """The name by which readers give this tensor of a layer, and of an expert where it has them."""
        return self.template.format(layer=layer, expert=expert)


# The graph's initializers and the roles stacked in each along their rows; those outside the layers, then a layer's, in
# the order in which they are stored. Experts are stacked one after the other, each with its roles in this order.
INITIALIZERS: Mapping[str, tuple[Role, ...]] = {
    "model.embed_tokens.weight": (Role.EMBEDDING,),
    "model.norm.weight": (Role.FINAL_NORM,),
    "lm_head.weight": (Role.HEAD,),
    "model.layers.{layer}.input_layernorm.weight": (Role.INPUT_NORM,),
    "model.layers.{layer}.post_attention_layernorm.weight": (Role.POST_ATTENTION_NORM,),
    "model.layers.{layer}.self_attn.qkv_proj.weight": (Role.QUERY, Role.KEY, Role.VALUE),
    "model.layers.{layer}.self_attn.qkv_proj.bias": (Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS),
    "model.layers.{layer}.self_attn.q_norm.weight": (Role.QUERY_NORM,),
    "model.layers.{layer}.self_attn.k_norm.weight": (Role.KEY_NORM,),
    "model.layers.{layer}.self_attn.o_proj.weight": (Role.OUTPUT,),
    "model.layers.{layer}.mlp.gate_up_proj.weight": (Role.GATE, Role.UP),
    "model.layers.{layer}.mlp.down_proj.weight": (Role.DOWN,),
    "model.layers.{layer}.mlp.gate.weight": (Role.ROUTER,),
    "model.layers.{layer}.mlp.experts_gate_up": (Role.EXPERT_GATE, Role.EXPERT_UP),
    "model.layers.{layer}.mlp.experts_down": (Role.EXPERT_DOWN,),
    "model.layers.{layer}.mlp.shared_expert.gate_up_proj.weight": (Role.SHARED_GATE, Role.SHARED_UP),
    "model.layers.{layer}.mlp.shared_expert.down_proj.weight": (Role.SHARED_DOWN,),
    "model.layers.{layer}.mlp.shared_expert_gate.weight": (Role.SHARED_EXPERT_GATE,),
}

_LAYER = "model.layers.{layer}."
_REMEMBERED = 32  # configurations: the planner asks for the same few thousands of times


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint; `layer` and `expert` are None for a tensor that isn't of one."""

    role: Role
    shape: Shape  # [out, in] of a projection
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """By which readers give it."""
        return self.role.tensor_name(self.layer, self.expert)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One initializer of the graph, of the model or of each layer of a kind.

    Attributes:
        template: its name, `{layer}` in the place of the layer's index.
        parts: role and shape of the checkpoint tensors stacked along their rows, in this order.
        num_experts: how often they are stacked, expert by expert; None: not of routed experts.
    """

    template: str
    parts: tuple[tuple[Role, Shape], ...]
    num_experts: int | None = None

    @property
    def roles(self) -> tuple[Role, ...]:
        """Of the stacked tensors."""
        return tuple(role for role, _ in self.parts)

    @property
    def weight_class(self) -> WeightClass:
        """That of all its tensors."""
        return self.parts[0][0].weight_class

    @property
    def shape(self) -> Shape:
        """[rows], [rows, in], or [E, rows, in] of experts."""
        rows = sum(shape[0] for _, shape in self.parts)
        lead = () if self.num_experts is None else (self.num_experts,)
        return (*lead, rows, *self.parts[0][1][1:])

    @property
    def local_name(self) -> str:
        """Its name inside a layer (`self_attn.qkv_proj.weight`)."""
        return self.template.removeprefix(_LAYER)

    def name(self, layer: int | None = None) -> str:
        """Its name in the graph."""
        return self.template.format(layer=layer)

    def tensors(self, layer: int | None = None) -> Iterator[Tensor]:
        """The checkpoint tensors that it is stacked from, in order."""
        for expert in (None,) if self.num_experts is None else range(self.num_experts):
            for role, shape in self.parts:
                yield Tensor(role, shape, layer, expert)


def _shapes(config: ModelConfig, *, is_sparse: bool) -> Mapping[Role, Shape]:
    """Shape of a tensor of every role that the model outside its layers and a layer of one kind have.

    Everything that models differ in is here.
    """
    M, V, moe = config.hidden_size, config.vocab_size, config.moe
    H, Hkv = config.query_size, config.key_value_size  # widths of queries and of keys
    shapes: dict[Role, Shape] = {
        Role.EMBEDDING: (V, M),
        Role.FINAL_NORM: (M,),
        Role.INPUT_NORM: (M,),
        Role.POST_ATTENTION_NORM: (M,),
        Role.QUERY: (H, M),
        Role.KEY: (Hkv, M),
        Role.VALUE: (Hkv, M),
        Role.OUTPUT: (M, H),
    }
    if not config.tie_word_embeddings:
        shapes[Role.HEAD] = (V, M)
    if config.attention_bias:
        shapes |= {Role.QUERY_BIAS: (H,), Role.KEY_BIAS: (Hkv,), Role.VALUE_BIAS: (Hkv,)}
    if config.kind.has_head_norms:
        shapes |= {Role.QUERY_NORM: (config.head_dim,), Role.KEY_NORM: (config.head_dim,)}
    if not is_sparse:
        F = config.intermediate_size
        return shapes | {Role.GATE: (F, M), Role.UP: (F, M), Role.DOWN: (M, F)}
    assert moe is not None
    F = moe.moe_intermediate_size
    shapes |= {Role.ROUTER: (moe.num_experts, M)}
    shapes |= {Role.EXPERT_GATE: (F, M), Role.EXPERT_UP: (F, M), Role.EXPERT_DOWN: (M, F)}
    if F := moe.shared_expert_intermediate_size:
        shapes |= {Role.SHARED_GATE: (F, M), Role.SHARED_UP: (F, M), Role.SHARED_DOWN: (M, F)}
        shapes |= {Role.SHARED_EXPERT_GATE: (1, M)}
    return shapes


def _parameters(config: ModelConfig, *, in_layers: bool, is_sparse: bool) -> Iterator[Parameter]:
    shapes = _shapes(config, is_sparse=is_sparse)
    for template, roles in INITIALIZERS.items():
        if template.startswith(_LAYER) == in_layers and roles[0] in shapes:
            is_expert = roles[0].weight_class is WeightClass.EXPERT
            experts = config.moe.num_experts if config.moe is not None and is_expert else None
            yield Parameter(template, tuple((role, shapes[role]) for role in roles), experts)


@functools.lru_cache(_REMEMBERED)
def outer_parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """What the model has outside its layers; with tied embeddings no head."""
    return tuple(_parameters(config, in_layers=False, is_sparse=False))


def layer_parameters(config: ModelConfig, *, is_sparse: bool) -> tuple[Parameter, ...]:
    """What each layer without experts, or with them, has."""
    return tuple(_parameters(config, in_layers=True, is_sparse=is_sparse))


@functools.lru_cache(_REMEMBERED)
def layer_kinds(config: ModelConfig) -> tuple[tuple[tuple[int, ...], tuple[Parameter, ...]], ...]:
    """The layers of each kind that there is, and what each of them has: for sums, which needn't list every tensor."""
    kinds = []
    for is_sparse in (False, True):
        layers = tuple(layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer) == is_sparse)
        if layers:
            kinds.append((layers, layer_parameters(config, is_sparse=is_sparse)))
    return tuple(kinds)


def placed_parameters(config: ModelConfig) -> Iterator[tuple[Parameter, int | None]]:
    """Every initializer that is made from the checkpoint, with its layer, in the order in which they are stored."""
    for parameter in outer_parameters(config):
        yield parameter, None
    of_layer = {layer: parameters for layers, parameters in layer_kinds(config) for layer in layers}
    for layer in range(config.num_hidden_layers):
        for parameter in of_layer[layer]:
            yield parameter, layer


def checkpoint_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Exactly what a checkpoint of this model holds."""
    for parameter, layer in placed_parameters(config):
        yield from parameter.tensors(layer)


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The exact set of tensors a checkpoint of this model holds: the name by which readers give it -> shape.

    A projection is [out, in]. `lm_head.weight` is absent with tied embeddings.
    """
    return {tensor.name: tensor.shape for tensor in checkpoint_tensors(config)}


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model; tied embeddings count once."""
    return _count_elements(config, experts=None)


def num_activated_parameters(config: ModelConfig) -> int:
    """Parameters that take part in one token's step: of the routed experts, only the chosen ones."""
    return _count_elements(config, experts=None if config.moe is None else config.moe.num_experts_per_tok)


def _count_elements(config: ModelConfig, *, experts: int | None) -> int:
    """Elements of all weights; `experts`: how many of each layer's routed ones count, None: all."""
    total = sum(_elements(parameter, experts) for parameter in outer_parameters(config))
    for layers, parameters in layer_kinds(config):
        total += len(layers) * sum(_elements(parameter, experts) for parameter in parameters)
    return total


def _elements(parameter: Parameter, experts: int | None) -> int:
    lead, *rest = parameter.shape
    counted = lead if parameter.num_experts is None or experts is None else experts
    return counted * math.prod(rest)


def weight_class_of(initializer: str) -> WeightClass | None:
    """The class of one of the trace's initializers by its name, or None: it isn't from the checkpoint."""
    roles = INITIALIZERS.get(re.sub(r"^model\.layers\.\d+\.", _LAYER, initializer))
    return None if roles is None else roles[0].weight_class
