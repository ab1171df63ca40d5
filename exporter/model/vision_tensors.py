"""The one table of the vision engine's weights: what a checkpoint holds, and what each initializer is made of.

Names and shapes of checkpoint tensors, recipes, the traced modules' parameters and parameter counts derive from it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass

from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Shape, WeightClass, num_parameters
from qwen_aot.exporter.model.vision import CHANNELS, GRID, NUM_QUERIES, VisionConfig

PREFIX = "transformer.visual."  # of the tensors' names in a checkpoint
_LAYER = "transformer.resblocks.{layer}."


class VisionRole(enum.Enum):
    """What a checkpoint tensor is to the tower or the resampler: its class, and its name behind PREFIX.

    The resampler's two matrices without `.weight` in their names are torch.nn.MultiheadAttention's.
    """

    PATCHES = (WeightClass.PROJECTION, "conv1.weight")
    POSITIONS = (WeightClass.NORM, "positional_embedding")
    PRE_NORM = (WeightClass.NORM, "ln_pre.weight")
    PRE_NORM_BIAS = (WeightClass.NORM, "ln_pre.bias")
    ATTENTION_NORM = (WeightClass.NORM, _LAYER + "ln_1.weight")
    ATTENTION_NORM_BIAS = (WeightClass.NORM, _LAYER + "ln_1.bias")
    QKV = (WeightClass.PROJECTION, _LAYER + "attn.in_proj.weight")
    QKV_BIAS = (WeightClass.BIAS, _LAYER + "attn.in_proj.bias")
    OUTPUT = (WeightClass.PROJECTION, _LAYER + "attn.out_proj.weight")
    OUTPUT_BIAS = (WeightClass.BIAS, _LAYER + "attn.out_proj.bias")
    MLP_NORM = (WeightClass.NORM, _LAYER + "ln_2.weight")
    MLP_NORM_BIAS = (WeightClass.NORM, _LAYER + "ln_2.bias")
    UP = (WeightClass.PROJECTION, _LAYER + "mlp.c_fc.weight")
    UP_BIAS = (WeightClass.BIAS, _LAYER + "mlp.c_fc.bias")
    DOWN = (WeightClass.DOWN, _LAYER + "mlp.c_proj.weight")
    DOWN_BIAS = (WeightClass.BIAS, _LAYER + "mlp.c_proj.bias")
    QUERIES = (WeightClass.NORM, "attn_pool.query")
    POOL_POSITIONS = (WeightClass.NORM, "attn_pool.pos_embed")
    KEY_VALUE = (WeightClass.PROJECTION, "attn_pool.kv_proj.weight")
    QUERY_NORM = (WeightClass.NORM, "attn_pool.ln_q.weight")
    QUERY_NORM_BIAS = (WeightClass.NORM, "attn_pool.ln_q.bias")
    KEY_VALUE_NORM = (WeightClass.NORM, "attn_pool.ln_kv.weight")
    KEY_VALUE_NORM_BIAS = (WeightClass.NORM, "attn_pool.ln_kv.bias")
    POOL_QKV = (WeightClass.PROJECTION, "attn_pool.attn.in_proj_weight")
    POOL_QKV_BIAS = (WeightClass.BIAS, "attn_pool.attn.in_proj_bias")
    POOL_OUTPUT = (WeightClass.PROJECTION, "attn_pool.attn.out_proj.weight")
    POOL_OUTPUT_BIAS = (WeightClass.BIAS, "attn_pool.attn.out_proj.bias")
    POST_NORM = (WeightClass.NORM, "ln_post.weight")
    POST_NORM_BIAS = (WeightClass.NORM, "ln_post.bias")
    PROJECTION = (WeightClass.PROJECTION, "proj")

    def __init__(self, weight_class: WeightClass, template: str) -> None:
        self.weight_class = weight_class
        self.template = template

    @property
    def is_in_layer(self) -> bool:
        """Whether each layer of the tower has one."""
        return self.template.startswith(_LAYER)

    def tensor_name(self, layer: int | None = None) -> str:
        """The checkpoint's name of this tensor, of a layer where it is in one."""
        return PREFIX + self.template.format(layer=layer)


@dataclass(frozen=True, slots=True)
class VisionTensor:
    """One tensor of a checkpoint; `layer` is None for a tensor that isn't of one."""

    role: VisionRole
    shape: Shape
    layer: int | None = None

    @property
    def name(self) -> str:
        """In the checkpoint."""
        return self.role.tensor_name(self.layer)


class Making(enum.Enum):
    """What is done to a checkpoint's tensor beside the cast to the type that it is stored in."""

    AS_IT_IS = "as it is"
    FLATTENED = "flattened"  # all but its rows
    DEINTERLEAVED = "deinterleaved"  # rows stored as q, k, v of each head -> all of q, all of k, all of v
    RESIZED = "resized"  # a table of GRID x GRID positions -> one of the patches' grid
    FIRST_THIRD = "first third"  # of its rows, and so on
    SECOND_THIRD = "second third"
    LAST_THIRD = "last third"


# The graph's initializers, what each is made of and how; outside the layers, then a layer's.
INITIALIZERS: dict[str, tuple[VisionRole, Making]] = {
    "patch_proj.weight": (VisionRole.PATCHES, Making.FLATTENED),
    "positions": (VisionRole.POSITIONS, Making.RESIZED),
    "ln_pre.weight": (VisionRole.PRE_NORM, Making.AS_IT_IS),
    "ln_pre.bias": (VisionRole.PRE_NORM_BIAS, Making.AS_IT_IS),
    "layers.{layer}.ln_1.weight": (VisionRole.ATTENTION_NORM, Making.AS_IT_IS),
    "layers.{layer}.ln_1.bias": (VisionRole.ATTENTION_NORM_BIAS, Making.AS_IT_IS),
    "layers.{layer}.qkv_proj.weight": (VisionRole.QKV, Making.DEINTERLEAVED),
    "layers.{layer}.qkv_proj.bias": (VisionRole.QKV_BIAS, Making.DEINTERLEAVED),
    "layers.{layer}.o_proj.weight": (VisionRole.OUTPUT, Making.AS_IT_IS),
    "layers.{layer}.o_proj.bias": (VisionRole.OUTPUT_BIAS, Making.AS_IT_IS),
    "layers.{layer}.ln_2.weight": (VisionRole.MLP_NORM, Making.AS_IT_IS),
    "layers.{layer}.ln_2.bias": (VisionRole.MLP_NORM_BIAS, Making.AS_IT_IS),
    "layers.{layer}.up_proj.weight": (VisionRole.UP, Making.AS_IT_IS),
    "layers.{layer}.up_proj.bias": (VisionRole.UP_BIAS, Making.AS_IT_IS),
    "layers.{layer}.down_proj.weight": (VisionRole.DOWN, Making.AS_IT_IS),
    "layers.{layer}.down_proj.bias": (VisionRole.DOWN_BIAS, Making.AS_IT_IS),
    "resampler.query": (VisionRole.QUERIES, Making.AS_IT_IS),
    "resampler.query_positions": (VisionRole.POOL_POSITIONS, Making.AS_IT_IS),
    "resampler.key_positions": (VisionRole.POOL_POSITIONS, Making.RESIZED),
    "resampler.kv_proj.weight": (VisionRole.KEY_VALUE, Making.AS_IT_IS),
    "resampler.ln_q.weight": (VisionRole.QUERY_NORM, Making.AS_IT_IS),
    "resampler.ln_q.bias": (VisionRole.QUERY_NORM_BIAS, Making.AS_IT_IS),
    "resampler.ln_kv.weight": (VisionRole.KEY_VALUE_NORM, Making.AS_IT_IS),
    "resampler.ln_kv.bias": (VisionRole.KEY_VALUE_NORM_BIAS, Making.AS_IT_IS),
    "resampler.q_proj.weight": (VisionRole.POOL_QKV, Making.FIRST_THIRD),
    "resampler.q_proj.bias": (VisionRole.POOL_QKV_BIAS, Making.FIRST_THIRD),
    "resampler.k_proj.weight": (VisionRole.POOL_QKV, Making.SECOND_THIRD),
    "resampler.k_proj.bias": (VisionRole.POOL_QKV_BIAS, Making.SECOND_THIRD),
    "resampler.v_proj.weight": (VisionRole.POOL_QKV, Making.LAST_THIRD),
    "resampler.v_proj.bias": (VisionRole.POOL_QKV_BIAS, Making.LAST_THIRD),
    "resampler.o_proj.weight": (VisionRole.POOL_OUTPUT, Making.AS_IT_IS),
    "resampler.o_proj.bias": (VisionRole.POOL_OUTPUT_BIAS, Making.AS_IT_IS),
    "ln_post.weight": (VisionRole.POST_NORM, Making.AS_IT_IS),
    "ln_post.bias": (VisionRole.POST_NORM_BIAS, Making.AS_IT_IS),
    "proj": (VisionRole.PROJECTION, Making.AS_IT_IS),
}


def _shapes(config: VisionConfig) -> dict[VisionRole, Shape]:
    W, F, M = config.width, config.mlp_width, config.output_dim
    return {
        VisionRole.PATCHES: (W, CHANNELS, config.patch_size, config.patch_size),
        VisionRole.POSITIONS: (GRID**2, W),
        VisionRole.PRE_NORM: (W,),
        VisionRole.PRE_NORM_BIAS: (W,),
        VisionRole.ATTENTION_NORM: (W,),
        VisionRole.ATTENTION_NORM_BIAS: (W,),
        VisionRole.QKV: (3 * W, W),
        VisionRole.QKV_BIAS: (3 * W,),
        VisionRole.OUTPUT: (W, W),
        VisionRole.OUTPUT_BIAS: (W,),
        VisionRole.MLP_NORM: (W,),
        VisionRole.MLP_NORM_BIAS: (W,),
        VisionRole.UP: (F, W),
        VisionRole.UP_BIAS: (F,),
        VisionRole.DOWN: (W, F),
        VisionRole.DOWN_BIAS: (W,),
        VisionRole.QUERIES: (NUM_QUERIES, M),
        VisionRole.POOL_POSITIONS: (GRID**2, M),
        VisionRole.KEY_VALUE: (M, W),
        VisionRole.QUERY_NORM: (M,),
        VisionRole.QUERY_NORM_BIAS: (M,),
        VisionRole.KEY_VALUE_NORM: (M,),
        VisionRole.KEY_VALUE_NORM_BIAS: (M,),
        VisionRole.POOL_QKV: (3 * M, M),
        VisionRole.POOL_QKV_BIAS: (3 * M,),
        VisionRole.POOL_OUTPUT: (M, M),
        VisionRole.POOL_OUTPUT_BIAS: (M,),
        VisionRole.POST_NORM: (M,),
        VisionRole.POST_NORM_BIAS: (M,),
        VisionRole.PROJECTION: (M, M),
    }


@dataclass(frozen=True, slots=True)
class VisionParameter:
    """One initializer of the graph.

    Attributes:
        name: in the graph.
        tensor: of the checkpoint.
        making: what is done to it.
        shape: of the initializer.
    """

    name: str
    tensor: VisionTensor
    making: Making
    shape: Shape

    @property
    def is_fp32(self) -> bool:
        """Whether it is stored as fp32 whatever the compute type is.

        Norms and tables are, and so is the projection that reads the residual stream as it is: no norm stands between,
        and the stream of a large tower goes beyond what fp16 holds.
        """
        role = self.tensor.role
        return role.weight_class is WeightClass.NORM or role is VisionRole.KEY_VALUE


def vision_parameters(config: VisionConfig, layers: int | None = None) -> Iterator[VisionParameter]:
    """Every initializer, in the order in which they are stored; of so many layers, None: of all."""
    shapes = _shapes(config)
    for template, (role, making) in INITIALIZERS.items():
        shape = _made_shape(shapes[role], making, config)
        for layer in range(config.layers if layers is None else layers) if role.is_in_layer else (None,):
            yield VisionParameter(template.format(layer=layer), VisionTensor(role, shapes[role], layer), making, shape)


def _made_shape(shape: Shape, making: Making, config: VisionConfig) -> Shape:
    match making:
        case Making.FLATTENED:
            return (shape[0], math.prod(shape[1:]))
        case Making.RESIZED:
            return (config.patches, *shape[1:])
        case Making.FIRST_THIRD | Making.SECOND_THIRD | Making.LAST_THIRD:
            return (shape[0] // 3, *shape[1:])
        case _:
            return shape


def vision_tensors(config: VisionConfig) -> Iterator[VisionTensor]:
    """Exactly what a checkpoint holds of the tower and the resampler, each tensor once."""
    shapes = _shapes(config)
    for role in VisionRole:
        for layer in range(config.layers) if role.is_in_layer else (None,):
            yield VisionTensor(role, shapes[role], layer)


def num_model_parameters(config: ModelConfig) -> int:
    """Parameters of a whole model, those of its tower and resampler among them."""
    return num_parameters(config) + (0 if config.vision is None else num_vision_parameters(config.vision))


def num_vision_parameters(config: VisionConfig) -> int:
    """Parameters of the tower and the resampler, their tables of positions included, as the checkpoint holds them."""
    return sum(math.prod(shape) * (config.layers if role.is_in_layer else 1) for role, shape in _shapes(config).items())
