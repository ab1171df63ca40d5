"""Which checkpoint tensors make each initializer of the traced decoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.rope import inverse_frequencies
from qwen_aot.exporter.weights.recipe import Output, Recipe, Source, Transform, cast_to

_ROTARY_ROWS = 4096  # positions computed at once, in float64: memory doesn't grow with the context


def decoder_recipes(config: ModelConfig, dtype: ir.DataType, positions: int) -> dict[str, Recipe]:
    """A recipe for every initializer of the trace, by its name.

    Args:
        config: the model's facts.
        dtype: compute type of projections and embedding; norms and rotary tables are float32.
        positions: rows of the rotary tables.
    """
    recipes = [*_ends(config, dtype, positions)]
    for layer in range(config.num_hidden_layers):
        recipes += _layer(config, dtype, layer)
    return {recipe.outputs[0].name: recipe for recipe in recipes}


def _stack(name: str, dtype: ir.DataType, sources: list[Source], shape: tuple[int, ...] | None = None) -> Recipe:
    """Sources stacked along their rows and cast, viewed as `shape`."""
    rows = sum(source.shape[0] for source in sources)
    output = Output(name, dtype, shape or (rows, *sources[0].shape[1:]))
    return Recipe(tuple(sources), (output,), cast_to(dtype))


def _ends(config: ModelConfig, dtype: ir.DataType, positions: int) -> Iterator[Recipe]:
    v, m = config.vocab_size, config.hidden_size
    embedding = Source("model.embed_tokens.weight", (v, m))
    yield _stack("model.embed_tokens.weight", dtype, [embedding])
    for name, function in (("model.rotary.cos", np.cos), ("model.rotary.sin", np.sin)):
        table = Output(name, ir.DataType.FLOAT, (positions, config.head_dim // 2))
        yield Recipe((), (table,), _rotary_table(config, positions, function))
    yield _stack("model.norm.weight", ir.DataType.FLOAT, [Source("model.norm.weight", (m,))])
    if not config.tie_word_embeddings:
        yield _stack("lm_head.weight", dtype, [Source("lm_head.weight", (v, m))])


def _rotary_table(config: ModelConfig, positions: int, function: np.ufunc) -> Transform:
    """Cosine or sine of position x frequency [positions, D/2]; angles are rounded to float32 as transformers does."""

    def transform(_: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        frequencies, attention_scaling = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        table = np.empty((positions, config.head_dim // 2), np.float32)
        for first in range(0, positions, _ROTARY_ROWS):
            rows = np.arange(first, min(first + _ROTARY_ROWS, positions), dtype=np.float32)
            angles = rows[:, None] * frequencies.astype(np.float32)
            table[first : first + len(rows)] = function(angles.astype(np.float64)) * attention_scaling
        return (table,)

    return transform


def _layer(config: ModelConfig, dtype: ir.DataType, layer: int) -> Iterator[Recipe]:
    m, d = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    prefix = f"model.layers.{layer}."
    rows = {"q": heads * d, "k": kv_heads * d, "v": kv_heads * d}
    for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        yield _stack(prefix + norm, ir.DataType.FLOAT, [Source(prefix + norm, (m,))])
    attention = prefix + "self_attn."
    yield _stack(
        attention + "qkv_proj.weight",
        dtype,
        [Source(f"{attention}{part}_proj.weight", (n, m)) for part, n in rows.items()],
    )
    if config.attention_bias:
        yield _stack(
            attention + "qkv_proj.bias",
            dtype,
            [Source(f"{attention}{part}_proj.bias", (n,)) for part, n in rows.items()],
        )
    output = attention + "o_proj.weight"
    yield _stack(output, dtype, [Source(output, (m, heads * d))])
    if config.moe is not None and layer in config.moe.sparse_layers:
        yield from _sparse_mlp(config, dtype, prefix + "mlp.")
    else:
        yield from _mlp(m, config.intermediate_size, dtype, prefix + "mlp.")


def _mlp(hidden_size: int, intermediate_size: int, dtype: ir.DataType, prefix: str) -> Iterator[Recipe]:
    m, f = hidden_size, intermediate_size
    yield _stack(
        prefix + "gate_up_proj.weight",
        dtype,
        [Source(f"{prefix}{part}_proj.weight", (f, m)) for part in ("gate", "up")],
    )
    yield _stack(prefix + "down_proj.weight", dtype, [Source(prefix + "down_proj.weight", (m, f))])


def _sparse_mlp(config: ModelConfig, dtype: ir.DataType, prefix: str) -> Iterator[Recipe]:
    moe = config.moe
    assert moe is not None
    m, f, experts = config.hidden_size, moe.moe_intermediate_size, range(moe.num_experts)
    yield _stack(prefix + "gate.weight", dtype, [Source(prefix + "gate.weight", (moe.num_experts, m))])
    yield _stack(
        prefix + "experts_gate_up",
        dtype,
        [Source(f"{prefix}experts.{e}.{part}_proj.weight", (f, m)) for e in experts for part in ("gate", "up")],
        (moe.num_experts, 2 * f, m),
    )
    yield _stack(
        prefix + "experts_down",
        dtype,
        [Source(f"{prefix}experts.{e}.down_proj.weight", (m, f)) for e in experts],
        (moe.num_experts, m, f),
    )
    if moe.shared_expert_intermediate_size:
        yield from _mlp(m, moe.shared_expert_intermediate_size, dtype, prefix + "shared_expert.")
        gate = prefix + "shared_expert_gate.weight"
        yield _stack(gate, dtype, [Source(gate, (1, m))])
