"""The decoder, written for export: one model for dense, GQA and MoE checkpoints.

Parameters have the names and shapes of `exporter.model.tensors`; a module has a bias, experts or a shared expert where
that table does. Projections that read the same input are one `Linear` (q, k, v; gate and up). The residual stream and
the norms' statistics are fp32 whatever the compute type, because Qwen's residual overflows fp16. The last layer's
output projection and MLP run for the tokens only whose logits are wanted, since nothing else reaches them: each row's
last one, or its last few where drafted tokens are checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qwen_aot.exporter.graph.ops import DOMAIN, VERSION, Op
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.position_tables import PositionTables
from qwen_aot.exporter.model.tensors import Shape, layer_parameters, outer_parameters

Cache = tuple[Tensor, Tensor]
Shapes = Mapping[str, Shape]  # of parameters, by their names in a layer or in the model
Attributes = dict[str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]]


def _call(op: Op, inputs: list[Tensor], attributes: Attributes | None, shape: Sequence[int]) -> Tensor:
    """One of our ops with one output of the first input's dtype."""
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{op}", inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=VERSION
    )
    return result


def _parameter(shape: Shape, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype))


class Linear(nn.Module):
    """x [..., K] -> [..., N], weight [N, K] as in Hugging Face; with a bias [N] where `shapes` has one."""

    def __init__(self, shapes: Shapes, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(shapes[f"{name}.weight"], dtype)
        self.bias = _parameter(shapes[f"{name}.bias"], dtype) if f"{name}.bias" in shapes else None

    def forward(self, x: Tensor) -> Tensor:
        """Applies the projection to x [..., K]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The Linear op on given weights [N, K]."""
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return _call(Op.LINEAR, inputs, None, [*x.shape[:-1], weight.shape[0]])


class RMSNorm(nn.Module):
    """fp32 in, fp32 out, weight [M] fp32."""

    def __init__(self, shapes: Shapes, name: str, epsilon: float) -> None:
        super().__init__()
        self.weight = _parameter(shapes[f"{name}.weight"], torch.float32)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis of x [..., M]."""
        result: Tensor = torch.onnx.ops.symbolic(
            "RMSNormalization",
            [x, self.weight],
            {"axis": -1, "epsilon": self.epsilon},
            dtype=torch.float32,
            shape=x.shape,
            version=23,
        )
        return result


class MLP(nn.Module):
    """SwiGLU MLP with gate and up in one projection."""

    def __init__(self, shapes: Shapes, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = Linear(shapes, f"{name}.gate_up_proj", dtype)
        self.down_proj = Linear(shapes, f"{name}.down_proj", dtype)
        self.intermediate_size = self.down_proj.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, S, M] to the same shape."""
        gate_up = self.gate_up_proj(x)
        inner = _call(Op.SWIGLU, [gate_up], None, [*x.shape[:-1], self.intermediate_size])
        result: Tensor = self.down_proj(inner)
        return result


class SparseMLP(nn.Module):
    """Routed experts (the SparseMoE op) plus the shared expert behind its sigmoid gate."""

    def __init__(self, config: ModelConfig, shapes: Shapes, dtype: torch.dtype) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.attributes: Attributes = {
            "num_experts_per_tok": moe.num_experts_per_tok,
            "norm_topk_prob": int(moe.norm_topk_prob),
        }
        self.gate = Linear(shapes, "mlp.gate", dtype)
        self.experts_gate_up = _parameter(shapes["mlp.experts_gate_up"], dtype)
        self.experts_down = _parameter(shapes["mlp.experts_down"], dtype)
        self.has_shared_expert = "mlp.shared_expert_gate.weight" in shapes
        if self.has_shared_expert:
            self.shared_expert = MLP(shapes, "mlp.shared_expert", dtype)
            self.shared_expert_gate = Linear(shapes, "mlp.shared_expert_gate", dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, S, M] to the same shape."""
        router_logits = self.gate(x).float()
        routed = _call(
            Op.SPARSE_MOE,
            [x, router_logits, self.experts_gate_up, self.experts_down],
            self.attributes,
            x.shape,
        )
        if not self.has_shared_expert:
            return routed
        shared: Tensor = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return routed + shared


class Attention(nn.Module):
    """q, k, v in one projection; the cached attention op; the output projection is applied by the layer.

    Norms of heads are inputs of that op, which knows where each head lies.
    """

    def __init__(self, config: ModelConfig, shapes: Shapes, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv_proj = Linear(shapes, "self_attn.qkv_proj", dtype)
        self.o_proj = Linear(shapes, "self_attn.o_proj", dtype)
        self.attributes: Attributes = {
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "scale": config.head_dim**-0.5,
        }
        self.width = config.query_size
        self.has_norms = "self_attn.q_norm.weight" in shapes
        if self.has_norms:
            self.q_norm = RMSNorm(shapes, "self_attn.q_norm", config.rms_norm_eps)
            self.k_norm = RMSNorm(shapes, "self_attn.k_norm", config.rms_norm_eps)
            self.attributes["norm_epsilon"] = config.rms_norm_eps

    def forward(
        self, x: Tensor, past: Cache, step: Sequence[Tensor], scale: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps x [B, S, M] to attention before its output projection [B, S, H*D], present key and value.

        `scale` [B, S, (H+2Hkv)*D]: what q, k and v are multiplied by. Of queries it is the same before their rotation.
        """
        qkv = self.qkv_proj(x)
        if scale is not None:
            qkv = qkv * scale
        attention, key, value = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{Op.CACHED_ATTENTION}",
            [qkv, *past, *step, *([self.q_norm.weight, self.k_norm.weight] if self.has_norms else [])],
            self.attributes,
            dtypes=[qkv.dtype, past[0].dtype, past[1].dtype],
            shapes=[[*x.shape[:-1], self.width], past[0].shape, past[1].shape],
            version=VERSION,
        )
        return attention, key, value


class DecoderLayer(nn.Module):
    """Attention and MLP around an fp32 residual stream."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, is_sparse: bool) -> None:
        super().__init__()
        shapes = {parameter.local_name: parameter.shape for parameter in layer_parameters(config, is_sparse=is_sparse)}
        self.dtype = dtype
        self.input_layernorm = RMSNorm(shapes, "input_layernorm", config.rms_norm_eps)
        self.self_attn = Attention(config, shapes, dtype)
        self.post_attention_layernorm = RMSNorm(shapes, "post_attention_layernorm", config.rms_norm_eps)
        self.mlp: nn.Module = SparseMLP(config, shapes, dtype) if is_sparse else MLP(shapes, "mlp", dtype)

    def forward(
        self,
        residual: Tensor,
        past: Cache,
        step: Sequence[Tensor],
        scale: Tensor | None,
        last_tokens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`last_tokens` [B, T, 1]: the only tokens of each row to carry on from here; None: all of them."""
        attention, key, value = self.self_attn(self.input_layernorm(residual).to(self.dtype), past, step, scale)
        if last_tokens is not None:
            residual, attention = pick_tokens(residual, last_tokens), pick_tokens(attention, last_tokens)
        residual = residual + self.self_attn.o_proj(attention).float()
        residual = residual + self.mlp(self.post_attention_layernorm(residual).to(self.dtype)).float()
        return residual, key, value


def pick_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table [P, N] by their indices [...] -> [..., N]."""
    result: Tensor = torch.onnx.ops.symbolic(
        "Gather", [table, rows], {"axis": 0}, dtype=table.dtype, shape=[*rows.shape, table.shape[1]], version=13
    )
    return result


def pick_tokens(x: Tensor, tokens: Tensor) -> Tensor:
    """Some tokens of each row: x [B, S, N], tokens [B, T, 1] (their indices) -> [B, T, N]."""
    result: Tensor = torch.onnx.ops.symbolic(
        "GatherND",
        [x, tokens],
        {"batch_dims": 1},
        dtype=x.dtype,
        shape=[*tokens.shape[:2], x.shape[2]],
        version=13,
    )
    return result


def last_tokens(new_tokens: Tensor, positions: Tensor | None) -> Tensor:
    """Indices [B, T, 1] of each row's last tokens, of `new_tokens` [B] in this step; an idle row's are 0.

    Args:
        new_tokens: int64 [B].
        positions: int64 [T], 0 … T-1. A row of fewer tokens has its first one in front of them. None: T is 1.
    """
    if positions is None:
        return (new_tokens - (new_tokens > 0).long()).unsqueeze(-1).unsqueeze(-1)
    index = new_tokens.unsqueeze(-1) - positions.shape[0] + positions
    return (index * (index > 0).long()).unsqueeze(-1)


def with_images(embeddings: Tensor, image_embeddings: Tensor, image_positions: Tensor) -> Tensor:
    """Puts rows that come from images in the places of tokens' embeddings.

    Args:
        embeddings: fp32 [B, S, M], of tokens.
        image_embeddings: fp32 [I, M], I at least 1.
        image_positions: int64 [B, S], the row for each token; -1 keeps the token's own. It picks the last row, which
            ONNX defines and nothing then reads.
    """
    rows: Tensor = torch.onnx.ops.symbolic(
        "Gather",
        [image_embeddings, image_positions],
        {"axis": 0},
        dtype=torch.float32,
        shape=embeddings.shape,
        version=13,
    )
    return torch.where((image_positions > -1).unsqueeze(-1), rows, embeddings)


class Decoder(nn.Module):
    """The whole model, with as many layers as it is given (the trace gives one of each kind).

    Args:
        config: the model's facts.
        dtype: compute type of projections and attention; also the cache's.
        sparse: for each layer that is built, whether it has experts.
        tables: of positions, which the graph reads.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, sparse: Sequence[bool], tables: PositionTables) -> None:
        super().__init__()
        shapes = {parameter.name(): parameter.shape for parameter in outer_parameters(config)}
        self.dtype = dtype
        self.embed_tokens = _parameter(shapes["model.embed_tokens.weight"], dtype)
        self.rotary_cos = _parameter((tables.rotary_rows, config.head_dim // 2), torch.float32)
        self.rotary_sin = _parameter((tables.rotary_rows, config.head_dim // 2), torch.float32)
        self.query_scales = _parameter((tables.positions, 1), torch.float32) if tables.scales_queries else None
        self.widths = (config.query_size, 2 * config.key_value_size)
        self.layers = nn.ModuleList(DecoderLayer(config, dtype, is_sparse=is_sparse) for is_sparse in sparse)
        self.norm = RMSNorm(shapes, "model.norm", config.rms_norm_eps)
        self.lm_head = Linear(shapes, "lm_head", dtype) if "lm_head.weight" in shapes else None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache_length: Tensor,
        new_tokens: Tensor,
        key_positions: Tensor,
        past: Sequence[Cache],
        logits_positions: Tensor | None = None,
        rotary_offset: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        image_positions: Tensor | None = None,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], list[Cache]]:
        """Shapes and meanings: `exporter.model.io_spec`.

        Returns:
            Logits [B, V] fp32, with `logits_positions` a pair of them and those of the last tokens [B, T, V]; present
            keys and values.
        """
        residual = pick_rows(self.embed_tokens, input_ids).float()
        if image_embeddings is not None and image_positions is not None:
            residual = with_images(residual, image_embeddings, image_positions)
        # Not `<=` and clamp, each of which becomes several ops in TensorRT; and TensorRT-RTX 1.7 can't compile `<` with
        # `position_ids + 1` where it computes attention without a fused kernel.
        mask = torch.logical_not(key_positions > position_ids.unsqueeze(1).unsqueeze(-1))  # [B, 1, S, W]
        last = last_tokens(new_tokens, logits_positions)
        rotary_rows = position_ids if rotary_offset is None else position_ids + rotary_offset.unsqueeze(-1)
        step = (self.rotary_cos, self.rotary_sin, rotary_rows, cache_length, new_tokens, mask)
        scale = self._scale(position_ids)
        present: list[Cache] = []
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            residual, key, value = layer(residual, past[index], step, scale, last if is_last else None)
            present.append((key, value))
        hidden = self.norm(residual).to(self.dtype)  # [B, T, M]
        head = self.embed_tokens if self.lm_head is None else self.lm_head.weight
        if logits_positions is None:
            return linear(hidden.squeeze(1), head).float(), present
        logits = linear(hidden.flatten(0, 1), head).float().reshape(*hidden.shape[:2], -1)
        return (logits.select(1, -1), logits), present

    def _scale(self, position_ids: Tensor) -> Tensor | None:
        """Factors of q, k and v [B, S, (H+2Hkv)*D] at positions [B, S]: those of keys and values are 1.

        Whole rows, since queries that are cut off and joined again make TensorRT-RTX 1.7 store the projection twice.
        """
        if self.query_scales is None:
            return None
        scale = pick_rows(self.query_scales, position_ids).to(self.dtype)
        query, rest = self.widths
        return torch.cat([scale.expand(-1, -1, query), torch.ones_like(scale).expand(-1, -1, rest)], dim=-1)
