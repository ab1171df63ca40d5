"""Bytes that an engine takes where it runs, from the model's facts alone: no graph is made, nothing heavy is imported.

Weights and cache are exact. Activations are an estimate, and carry that in their name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from qwen_aot.engines.spec.build_spec import BuildSpec, Precision, Target
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.experts import gather_limit
from qwen_aot.exporter.quantize.blockwise import BLOCK_SIZES
from qwen_aot.runtime.bundle.manifest import cache_capacity

_ARENA_FACTOR = 2  # see `activation_bytes`
_MATMUL_WORKSPACE = 8_192_000  # bytes that TensorRT-RTX 1.7.1 keeps for matrix products, whatever their sizes are
_COMPUTE_BYTES = {"FLOAT": 4, "FLOAT16": 2, "BFLOAT16": 2}
_CACHE_BYTES = _COMPUTE_BYTES | {"INT8": 1}
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


def activation_bytes(config: ModelConfig, spec: BuildSpec) -> int:
    """The largest tensors that live at once in a step, in bytes: an estimate.

    The larger of a prefill step, one row of a whole chunk, and of a decode step, one token of every row. Derived from
    the graph, with T = B·S tokens, the window W at the capacity, and c bytes an element of the compute type. Always
    alive: the residual stream [T, M] fp32, logits [B, V] fp32, and, on TensorRT without the attention plugin, the
    causal mask [B, S, W] of two bytes. On top comes the largest of

    - attention: its input [T, M], q, k and v as projected and as rotated, 2 x [T, (H + 2·Hkv)·D], and the result
      [T, H·D], in c. Scores aren't kept: ONNX Runtime's kernel fuses attention (512 tokens of 16 heads took 15 MiB of
      memory with a cache of 2,048 tokens and with one of 8,192), and so does TensorRT. TensorRT copies the window out
      of the cache, 2 x [B, W, Hkv·D]; the plugin doesn't, and its workspace, the rotated queries and the parts of
      decode attention, is within the above;
    - an MLP: its input [T, M], gate and up [T, 2F], their product [T, F], in c;
    - routed experts: every expert on every token, E x [T, 3F] or E x [T, F + M] in c, or the weights that a step of few
      tokens gathers, n·k x 3·M·F for the most tokens n that it is done for; ONNX Runtime's kernel runs each token's
      own experts, k x [T, 3F]; so does the plugin, k x [T, F] in c and k x [T, M] fp32
      (`plugins.launch.moe_workspace`);
    - the head: [B, V] in c.

    In all of these phases TensorRT has half a window's copy and its workspace for matrix products as well, and in
    attention at least that much. Found by varying one size at a time in 24 graphs: a decode step of one row takes
    4·C·Hkv·D or, where that is more, 2·C·Hkv·D + 8,192,000 bytes, and some vectors.

    ONNX Runtime's arena keeps twice that: steps of 256 tokens took 2.0 to 2.3 times the sum above in models of the
    widths of 0.5B, 7B and MoE-A2.7B. TensorRT-RTX 1.7's builder says what it will need ("Total Activation
    Memory"): this is 0.98 to 1.34 times as much in 24 dense graphs and 5 with experts (docs/planner.md).
    """
    steps = (1, spec.prefill_chunk), (spec.max_batch, 1)
    return max(_step_activation_bytes(config, spec, *step) for step in steps) * (
        1 if spec.is_tensorrt else _ARENA_FACTOR
    )


def _step_activation_bytes(config: ModelConfig, spec: BuildSpec, B: int, S: int) -> int:
    """The largest tensors that live at once in a step of B rows and S tokens each; see `activation_bytes`."""
    T, c = B * S, _COMPUTE_BYTES[spec.combination.compute_type]
    W = cache_capacity(spec.context_for(config.max_position_embeddings), spec.prefill_chunk)
    M, V = config.hidden_size, config.vocab_size
    is_windowed = spec.is_tensorrt and spec.attention == "native"
    always = 4 * T * M + 4 * B * V + (2 * B * S * W if is_windowed else 0)
    projected = config.query_size + 2 * config.key_value_size
    window = 2 * c * B * W * config.key_value_size if is_windowed else 0
    aside = window // 2 + _MATMUL_WORKSPACE if spec.is_tensorrt else 0
    sparse = len(config.moe.sparse_layers) if config.moe is not None else 0
    attention = c * T * (M + 2 * projected + config.query_size)
    phases = [attention + max(window - aside, 0), c * B * V]
    if sparse < config.num_hidden_layers:
        phases.append(c * T * (M + 3 * config.intermediate_size))
    if config.moe is not None and sparse:
        moe = config.moe
        E, k, F = moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size
        phases.append(c * T * (M + 3 * moe.shared_expert_intermediate_size))
        if _is_blockwise(spec):
            phases.append(c * T * (M + 3 * k * F))
        elif spec.moe == "plugin":
            phases.append(c * T * (M + k * F) + 4 * T * k * M)
        else:
            few = min(T, gather_limit(moe))
            phases += [c * (T * M + E * T * (F + max(2 * F, M))), c * (few * M + few * k * 3 * M * F)]
    return always + aside + max(phases)


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


@dataclass(frozen=True, slots=True)
class _Form:
    """How a matrix [N, K] is stored.

    Attributes:
        bits: of an element or its code.
        scale_bytes: of one scale; 0: not quantized.
        block_size: elements along K that share a scale; None: the whole row.
        fills_blocks: a row's last block is stored whole, however much of it is used.
        zero_point_bits: of a block's zero point, packed row by row; 0: none.
    """

    bits: int
    scale_bytes: int = 0
    block_size: int | None = None
    fills_blocks: bool = False
    zero_point_bits: int = 0

    def bytes_of(self, rows: int, width: int) -> int:
        """Of a matrix [rows, width]."""
        block = self.block_size or width
        blocks = -(-width // block)
        stored = blocks * block if self.fills_blocks else width
        zero_points = -(-blocks * self.zero_point_bits // 8)
        return -(-rows * stored * self.bits // 8) + rows * (blocks * self.scale_bytes + zero_points)


@dataclass(frozen=True, slots=True)
class _Forms:
    """How one target and precision stores each kind of weight.

    Attributes:
        plain: routers, gates and biases: the compute type.
        rotary: the rotary tables.
        embedding, head, down, projection, expert: the matrices of these names; `down` are the down projections of
            dense MLPs and shared experts.
        shares_tied_head: the head reads the embedding's own bytes where the model ties them.
        channels: a second form of the projections, for prefill alone; None: there is none.
    """

    plain: _Form
    rotary: _Form
    embedding: _Form
    head: _Form
    down: _Form
    projection: _Form
    expert: _Form
    shares_tied_head: bool = True
    channels: _Form | None = None


def _is_blockwise(spec: BuildSpec) -> bool:
    """Whether the weights are ONNX Runtime's blocks (`exporter.quantize`)."""
    return not spec.is_tensorrt and spec.effective_block_size is not None


def _forms(spec: BuildSpec) -> _Forms:
    plain = _Form(8 * _COMPUTE_BYTES[spec.combination.compute_type])
    if _is_blockwise(spec):
        return _block_forms(spec, plain)
    # RotaryEmbedding wants its tables in the type of its input, so they are cast when they are written; the plugin
    # reads fp32.
    rotary = _Form(32) if spec.attention == "plugin" else plain
    forms = _Forms(plain, rotary, plain, plain, plain, plain, plain)
    if spec.precision in (Precision.INT8, Precision.INT4, Precision.FP8):
        bits = 4 if spec.precision == Precision.INT4 else 8
        weights = _Form(bits, plain.bits // 8, spec.effective_block_size)
        forms = dataclasses.replace(forms, down=weights, projection=weights, expert=weights)
        if spec.tensorrt.quantize_head:
            forms = dataclasses.replace(forms, head=weights, shares_tied_head=False)
    return forms


def _block_forms(spec: BuildSpec, plain: _Form) -> _Forms:
    """Blocks, filled up; the embedding's zero points are a byte each, the others' packed.

    On CUDA the embedding has zero points in any case (`exporter.lowering.ort.provider`).
    """

    def blocks(bits: int, zero_point_bits: int, *, always: bool = False) -> _Form:
        zero_points = zero_point_bits if always or not spec.symmetric else 0
        return _Form(bits, plain.bits // 8, spec.effective_block_size, fills_blocks=True, zero_point_bits=zero_points)

    bits, sensitive = 8 if spec.precision == Precision.INT8 else 4, spec.effective_sensitive_bits
    assert sensitive is not None
    return _Forms(
        plain=plain,
        rotary=plain,
        embedding=blocks(sensitive, 8, always=spec.target == Target.CUDA),
        head=blocks(sensitive, sensitive),
        down=blocks(sensitive, sensitive),
        projection=blocks(bits, bits),
        expert=blocks(bits, bits),
        channels=_Form(8, 4) if spec.fast_prefill else None,
    )


def _parts(config: ModelConfig, spec: BuildSpec, context: int) -> Iterator[_Part]:
    """Every weight of the model, layers of one kind together."""
    forms = _forms(spec)
    M, layers = config.hidden_size, config.num_hidden_layers
    sparse = len(config.moe.sparse_layers) if config.moe is not None else 0
    yield from _ends(config, spec, forms, context)
    yield _Part.whole(4 * M * (2 * layers + 1))  # norms, fp32
    yield from _attention(config, forms, layers)
    if sparse < layers:
        yield from _mlp(config, forms, config.intermediate_size, layers - sparse, not config.is_sparse(layers - 1))
    if sparse:
        yield from _sparse_mlp(config, spec, forms, sparse)


def _ends(config: ModelConfig, spec: BuildSpec, forms: _Forms, context: int) -> Iterator[_Part]:
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


def _attention(config: ModelConfig, forms: _Forms, layers: int) -> Iterator[_Part]:
    """q, k and v with their biases, and the output projection."""
    M, projected = config.hidden_size, config.query_size + 2 * config.key_value_size
    yield _Part.whole(forms.projection.bytes_of(projected, M)) * layers
    yield _Part.whole(forms.projection.bytes_of(M, config.query_size)) * layers
    if config.attention_bias:
        yield _Part.whole(forms.plain.bytes_of(1, projected)) * layers
    if forms.channels is not None:
        yield _Part(forms.channels.bytes_of(projected, M), 0) * layers
        yield _Part(forms.channels.bytes_of(M, config.query_size), 0) * (layers - 1)  # the last one's sees one token


def _mlp(config: ModelConfig, forms: _Forms, size: int, count: int, has_last: bool) -> Iterator[_Part]:
    """`count` dense MLPs or shared experts of an intermediate size; `has_last`: the last layer's is among them."""
    M = config.hidden_size
    yield _Part.whole(forms.projection.bytes_of(2 * size, M) + forms.down.bytes_of(M, size)) * count
    if forms.channels is not None:
        channels = forms.channels.bytes_of(2 * size, M) + forms.channels.bytes_of(M, size)
        yield _Part(channels, 0) * (count - has_last)


def _sparse_mlp(config: ModelConfig, spec: BuildSpec, forms: _Forms, count: int) -> Iterator[_Part]:
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


def _expert_bytes(forms: _Forms, spec: BuildSpec, hidden_size: int, intermediate_size: int) -> int:
    """Of one routed expert.

    ONNX Runtime's kernel wants blocks that divide M, and F filled up to whole blocks; where no block size divides M,
    the experts stay as computed.
    """
    form, M, F = forms.expert, hidden_size, intermediate_size
    if _is_blockwise(spec):
        assert form.block_size is not None
        dividing = [size for size in BLOCK_SIZES if size <= form.block_size and M % size == 0]
        form = dataclasses.replace(form, block_size=max(dividing)) if dividing else forms.plain
        F = -(-F // (form.block_size or 1)) * (form.block_size or 1)
    return form.bytes_of(2 * F, M) + form.bytes_of(M, F)
