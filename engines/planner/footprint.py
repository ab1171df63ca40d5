"""Bytes that an engine takes where it runs, from the model's facts alone: no graph is made, nothing heavy is imported.

Weights and cache are exact. Activations are an estimate, and carry that in their name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from qwen_aot.engines.planner.activations import activation_bytes
from qwen_aot.engines.planner.forms import COMPUTE_BYTES, Forms, is_blockwise, weight_forms
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.quantize.blockwise import BLOCK_SIZES
from qwen_aot.runtime.bundle.manifest import cache_capacity

_CACHE_BYTES = COMPUTE_BYTES | {"INT8": 1}
_CACHE_SCALE_BYTES = 2  # fp16: one for each key and each value of a head and token


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one engine at its full context and batch, in bytes.

    Attributes:
        weight_bytes: exact, each weight once; an engine's own code isn't in it.
        cache_bytes: exact, of the whole capacity.
        activation_bytes_estimated: see `activation_bytes`.
        step_bytes: what a decode step of all rows must read, each row at its full context.
    """

    weight_bytes: int
    cache_bytes: int
    activation_bytes_estimated: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of memory."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes_estimated


def footprint(config: ModelConfig, spec: BuildSpec) -> Footprint:
    """Sizes up what `spec` builds of a model.

    A decode step reads every weight but these: of the embedding and the rotary tables one row a sequence, of routed
    experts the chosen ones, min(E, B·k) (rows that choose the same experts read fewer), and nothing of what prefill
    alone uses. It reads the cache up to the context, not to the capacity.

    Raises:
        BuildError: the context is beyond the model's.
    """
    context = spec.context_for(config.max_position_embeddings)
    parts = tuple(_parts(config, spec, context))
    return Footprint(
        weight_bytes=sum(part.stored for part in parts),
        cache_bytes=_cache_bytes(config, spec, cache_capacity(context, spec.prefill_chunk)),
        activation_bytes_estimated=activation_bytes(config, spec),
        step_bytes=sum(part.read for part in parts) + _cache_bytes(config, spec, context),
    )


def _cache_bytes(config: ModelConfig, spec: BuildSpec, tokens: int) -> int:
    itemsize = _CACHE_BYTES[spec.cache_type]
    scales = 2 * config.num_hidden_layers * config.num_key_value_heads if spec.cache_type == "INT8" else 0
    return spec.max_batch * tokens * (config.kv_bytes_per_token(itemsize) + scales * _CACHE_SCALE_BYTES)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some weights: bytes that lie in memory, and bytes that a decode step reads of them."""

    stored: int
    read: int

    @classmethod
    def whole(cls, size: int) -> _Part:
        return cls(size, size)

    def __mul__(self, count: int) -> _Part:
        return _Part(self.stored * count, self.read * count)


def _parts(config: ModelConfig, spec: BuildSpec, context: int) -> Iterator[_Part]:
    """Every weight of the model, layers of one kind together."""
    forms = weight_forms(spec)
    M, layers = config.hidden_size, config.num_hidden_layers
    sparse = len(config.moe.sparse_layers) if config.moe is not None else 0
    yield from _ends(config, spec, forms, context)
    yield _Part.whole(4 * M * (2 * layers + 1))  # norms, fp32
    yield from _attention(config, forms, layers)
    if sparse < layers:
        yield from _mlp(config, forms, config.intermediate_size, layers - sparse, not config.is_sparse(layers - 1))
    if sparse:
        yield from _sparse_mlp(config, spec, forms, sparse)


def _ends(config: ModelConfig, spec: BuildSpec, forms: Forms, context: int) -> Iterator[_Part]:
    """Embedding, rotary tables, head."""
    V, M, B = config.vocab_size, config.hidden_size, spec.max_batch
    yield _Part(forms.embedding.bytes_of(V, M), forms.embedding.bytes_of(B, M))
    positions = cache_capacity(context, spec.prefill_chunk)
    yield _Part(forms.rotary.bytes_of(positions, config.head_dim), forms.rotary.bytes_of(B, config.head_dim))
    head = forms.head.bytes_of(V, M)
    if config.tie_word_embeddings and forms.shares_tied_head:
        without = dataclasses.replace(forms.head, zero_point_bits=0)  # those alone are another tensor than its own
        yield _Part(head - without.bytes_of(V, M), head)
    else:
        yield _Part.whole(head)


def _attention(config: ModelConfig, forms: Forms, layers: int) -> Iterator[_Part]:
    """q, k and v with their biases, and the output projection."""
    M, projected = config.hidden_size, config.query_size + 2 * config.key_value_size
    yield _Part.whole(forms.projection.bytes_of(projected, M)) * layers
    yield _Part.whole(forms.projection.bytes_of(M, config.query_size)) * layers
    if config.attention_bias:
        yield _Part.whole(forms.plain.bytes_of(1, projected)) * layers
    if forms.channels is not None:
        yield _Part(forms.channels.bytes_of(projected, M), 0) * layers
        yield _Part(forms.channels.bytes_of(M, config.query_size), 0) * (layers - 1)  # the last one's sees one token


def _mlp(config: ModelConfig, forms: Forms, size: int, count: int, has_last: bool) -> Iterator[_Part]:
    """`count` dense MLPs or shared experts of an intermediate size; `has_last`: the last layer's is among them."""
    M = config.hidden_size
    yield _Part.whole(forms.projection.bytes_of(2 * size, M) + forms.down.bytes_of(M, size)) * count
    if forms.channels is not None:
        channels = forms.channels.bytes_of(2 * size, M) + forms.channels.bytes_of(M, size)
        yield _Part(channels, 0) * (count - has_last)


def _sparse_mlp(config: ModelConfig, spec: BuildSpec, forms: Forms, count: int) -> Iterator[_Part]:
    """Routers, routed experts, shared experts and their gates of `count` layers."""
    moe, M = config.moe, config.hidden_size
    assert moe is not None
    E = moe.num_experts
    expert = _expert_bytes(forms, spec, M, moe.moe_intermediate_size)
    yield _Part(E * expert, min(E, spec.max_batch * moe.num_experts_per_tok) * expert) * count
    yield _Part.whole(forms.plain.bytes_of(E, M)) * count
    if moe.shared_expert_intermediate_size:
        is_last = config.is_sparse(config.num_hidden_layers - 1)
        yield from _mlp(config, forms, moe.shared_expert_intermediate_size, count, is_last)
        yield _Part.whole(forms.plain.bytes_of(1, M)) * count


def _expert_bytes(forms: Forms, spec: BuildSpec, hidden_size: int, intermediate_size: int) -> int:
    """Of one routed expert.

    ONNX Runtime's kernel wants blocks that divide M, and F filled up to whole blocks; where no block size divides M,
    the experts stay as computed.
    """
    form, M, F = forms.expert, hidden_size, intermediate_size
    if is_blockwise(spec):
        assert form.block_size is not None
        dividing = [size for size in BLOCK_SIZES if size <= form.block_size and M % size == 0]
        form = dataclasses.replace(form, block_size=max(dividing)) if dividing else forms.plain
        F = -(-F // (form.block_size or 1)) * (form.block_size or 1)
    return form.bytes_of(2 * F, M) + form.bytes_of(M, F)
