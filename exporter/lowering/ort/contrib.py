"""The `ort` lowering: the graph that ONNX Runtime's CPU or CUDA kernels run fastest, with its contrib ops.

Attention, its rotation and the cache write are one GroupQueryAttention; each residual addition and the norm behind it
are one SkipSimplifiedLayerNormalization; quantized weights are read by MatMulNBits, GatherBlockQuantized and QMoE
(`exporter.lowering.ort.quantized`). docs/performance.md has the measurements behind each choice for the CPU; what the
CUDA kernels lack is in `exporter.lowering.ort.provider`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.lowering.ort.int8_cache import store_cache_as_int8
from qwen_aot.exporter.lowering.ort.narrow import keep_tables_narrow
from qwen_aot.exporter.lowering.ort.prefill import split_prefill
from qwen_aot.exporter.lowering.ort.provider import MS_DOMAIN, MS_VERSION, PROVIDERS, Provider, ProviderFacts
from qwen_aot.exporter.lowering.ort.quantized import quantize_embedding, quantize_experts, quantize_linears
from qwen_aot.exporter.lowering.ort.rounded_inputs import multiply_integers
from qwen_aot.exporter.lowering.own_codes import order_columns, separate_parts
from qwen_aot.exporter.lowering.passes import (
    clean_up,
    fold_casts_of_initializers,
    inline_definitions,
    lower_head,
    remove_unused_inputs,
    transpose_recipe,
)
from qwen_aot.exporter.model.io_spec import ROTARY_OFFSET
from qwen_aot.exporter.quantize.blockwise import BlockFormat
from qwen_aot.exporter.quantize.formats import ByClass, ByCodes, Formats
from qwen_aot.exporter.quantize.store import QuantizedWeights
from qwen_aot.exporter.weights.recipe import Traced

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OrtOptions:
    """What the lowering leaves to choose.

    Attributes:
        weights: how projections, experts, head and embedding are stored; None: in the trace's compute type.
        sensitive: how the matrices are stored whose rounding costs most (`exporter.model.tensors.SENSITIVE`: head,
            embedding, down projections, but not those of experts); None: as the others.
        accuracy_level: of MatMulNBits: 4 quantizes activations to int8 inside (block by block, so that rows don't
            touch each other), 1 computes in fp32.
        fast_prefill: steps of many tokens read a second, 8-bit copy of the projections (`split_prefill`).
        provider: whose kernels will run the graph.
        own_codes: what the checkpoint stores as codes keeps them, each matrix in the blocks that hold its own; there is
            no `weights` then, and `sensitive` is of embedding and head alone, where these are plain numbers.
        int8_cache: keys and values are stored as int8, with the scales that `int8_cache.set_scales` brings.
    """

    weights: BlockFormat | None = None
    sensitive: BlockFormat | None = None
    accuracy_level: int = 4
    fast_prefill: bool = False
    provider: Provider = Provider.CPU
    own_codes: bool = False
    int8_cache: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether any weights are codes."""
        return self.own_codes or self.weights is not None

    def __post_init__(self) -> None:
        if self.fast_prefill and self.provider is not Provider.CPU:
            raise ExportError(f"fast_prefill exists for the CPU's kernels, not for those of {self.provider}")
        if self.int8_cache and self.provider is not Provider.CPU:
            raise ExportError(f"int8_cache exists for the CPU's kernels, not for those of {self.provider}")
        if self.own_codes and self.weights is not None:
            raise ExportError(
                "weights that keep the checkpoint's codes have no format of their own; leave one of both out"
            )
        if self.fast_prefill and not self.is_quantized:
            raise ExportError("fast_prefill goes with quantized weights, and these are fp32; choose a block format")
        if self.sensitive is not None and not self.is_quantized:
            raise ExportError("a format of sensitive matrices goes with quantized weights, and these are fp32")
        if self.accuracy_level not in (1, 4):
            raise ExportError(f"accuracy_level {self.accuracy_level} doesn't exist; accepted: 1 (fp32), 4 (int8)")


def lower(traced: Traced, options: OrtOptions | None = None) -> Traced:
    """Lowers a trace in place and returns the same object.

    Raises:
        ExportError: the provider has no kernels of these ops in the trace's compute type, or none for its experts.
    """
    options = options or OrtOptions()
    facts, compute_type = PROVIDERS[options.provider], traced.compute_type
    if compute_type not in facts.compute_types:
        accepted = " or ".join(_COMMON_NAMES[dtype] for dtype in facts.compute_types)
        raise ExportError(
            f"the ort lowering for {options.provider} takes an {accepted} trace, this one is "
            f"{compute_type.name.lower()}; trace in {' or '.join(dtype.name for dtype in facts.compute_types)}"
        )
    if options.is_quantized and traced.config.moe is not None and not facts.has_quantized_experts:
        raise ExportError(
            f"quantized experts don't exist for {options.provider}: ONNX Runtime's QMoE kernel there takes another "
            "layout of weights than the one that can be checked without a GPU; store this model in fp16"
        )
    if _has_rotary_offset(traced) and not facts.has_positions:
        raise ExportError(
            f"a context beyond {traced.config.dynamic_ntk_length} tokens needs several rotary tables for this model "
            f"(use_dynamic_ntk), and positions of one's own aren't known to work in the kernels of {options.provider}; "
            f"accepted: --max-context up to {traced.config.dynamic_ntk_length}"
        )
    traced.model.opset_imports[MS_DOMAIN] = MS_VERSION
    for name, step in passes(traced, options):
        count = step(traced)
        if count:
            logger.info("%s: %d", name, count)
    traced.model.metadata_props["qwen_aot.lowering"] = "ort"
    return traced


_QUERY_SEQLENS = 16  # its place among GroupQueryAttention's inputs

_COMMON_NAMES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16"}


def passes(traced: Traced, options: OrtOptions) -> list[tuple[str, Callable[[Traced], int]]]:
    """The passes in order, by name."""
    facts, compute_type = PROVIDERS[options.provider], traced.compute_type
    last: list[tuple[str, Callable[[Traced], int]]] = []
    steps: list[tuple[str, Callable[[Traced], int]]] = [
        ("fuse_swiglu", fuse_swiglu),
        ("fuse_skip_norm", fuse_skip_norm),
    ]
    if compute_type in facts.attention_types:
        steps.insert(0, ("fuse_attention", lambda traced: fuse_attention(traced, facts)))
    if options.int8_cache:
        steps.insert(1, ("store_cache_as_int8", store_cache_as_int8))
    if options.is_quantized:
        # One for all: a tied weight is met twice.
        weights = QuantizedWeights(traced, _formats(traced, options), scale_type=compute_type)
        explicit = not facts.has_default_zero_point
        steps += [
            ("quantize_embedding", lambda traced: quantize_embedding(traced, weights, with_zero_points=explicit)),
            ("quantize_linears", lambda traced: quantize_linears(traced, weights, options.accuracy_level)),
            ("quantize_experts", lambda traced: quantize_experts(traced, weights, options.accuracy_level)),
        ]
        if options.own_codes:
            steps[:0] = [
                ("separate_parts", separate_parts),
                ("order_columns", order_columns),
                ("multiply_integers", lambda traced: multiply_integers(traced, options.provider)),
            ]
            last.append(("keep_tables_narrow", keep_tables_narrow))
        if options.fast_prefill:
            last.append(("split_prefill", lambda traced: split_prefill(traced, weights)))
    return [
        *steps,
        ("lower_head", lower_head),  # these two: what isn't quantized
        ("lower_linear", lower_linear),
        ("inline_definitions", inline_definitions),  # what no kernel takes
        ("clean_up", clean_up),
        ("fold_casts_of_initializers", fold_casts_of_initializers),  # after clean_up has merged equal Casts
        ("remove_unused_inputs", remove_unused_inputs),  # after clean_up dropped what computed the mask
        *last,  # copies the whole graph, so it wants it finished
    ]


def _formats(traced: Traced, options: OrtOptions) -> Formats:
    if options.weights is None:
        return ByCodes(traced.storage, traced.compute_type.numpy(), options.sensitive)
    return ByClass(options.weights, options.sensitive or options.weights)


def fuse_attention(traced: Traced, facts: ProviderFacts) -> int:
    """CachedAttention -> GroupQueryAttention. Returns the number of nodes replaced.

    The kernel takes each row's cached and new tokens as `seqlens_k` (their sum less one) and `query_seqlens`, so it
    needs no mask, and positions only where there are several rotary tables; `total_sequence_length`, an upper bound, is
    the capacity C. A kernel without `query_seqlens` is told that all S tokens of a row are new: what it writes for
    padding and for an idle row lies at and beyond `cache_length + new_tokens`, which is scratch, and no valid token
    attends to it. Such a step is of one row, or of one token a row (the kernel's rule).
    Requires: head_dim a multiple of 16 (the kernel's rule); other nodes keep their definition.
    """
    graph = traced.model.graph
    nodes = [node for node in graph if ops.is_op(node, ops.Op.CACHED_ATTENTION)]
    nodes = [node for node in nodes if node.attributes["head_dim"].as_int() % 16 == 0]
    if not nodes:
        return 0
    lengths = _attention_lengths(graph, nodes[0], has_query_lengths=facts.has_query_lengths)
    tables = _rotary_tables(graph, nodes[0])
    positions = nodes[0].inputs[5] if _has_rotary_offset(traced) else None
    for node in nodes:
        qkv, past_key, past_value = node.inputs[:3]
        inputs = [qkv, None, None, past_key, past_value, lengths.last_key, lengths.total, *tables]
        if positions is not None:
            inputs.append(positions)
        if lengths.new is not None:
            inputs += [None] * (_QUERY_SEQLENS - len(inputs)) + [lengths.new]
        new = ir.node(
            "GroupQueryAttention",
            inputs,
            {
                "num_heads": node.attributes["num_heads"].as_int(),
                "kv_num_heads": node.attributes["num_kv_heads"].as_int(),
                "scale": node.attributes["scale"].as_float(),
                "do_rotary": 1,
            },
            domain=MS_DOMAIN,
            num_outputs=3,
            name=node.name,
        )
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
    return len(nodes)


def _has_rotary_offset(traced: Traced) -> bool:
    """Whether rows of a step are rotated by tables of their own."""
    return any((value.name or "").startswith(ROTARY_OFFSET) for value in traced.model.graph.inputs)


@dataclass(frozen=True, slots=True)
class _Lengths:
    last_key: ir.Value  # [B] int32: cached and new tokens, less one
    new: ir.Value | None  # [B] int32: new tokens; None: all S are
    total: ir.Value  # [] int32: the capacity


def _attention_lengths(graph: ir.Graph, attention: ir.Node, *, has_query_lengths: bool) -> _Lengths:
    """Computes the kernel's int32 lengths once, before the first attention node."""
    qkv, past_key, cache_length, new_tokens = (attention.inputs[index] for index in (0, 1, 6, 7))
    to_int32 = {"to": ir.DataType.INT32.value}
    one = ir.node("Constant", [], {"value_int": 1}, name="one_token")
    capacity = ir.node("Shape", [past_key], {"start": 2, "end": 3}, name="capacity")
    scalar = ir.node("Squeeze", [capacity.outputs[0]], name="capacity_scalar")
    total = ir.node("Cast", [scalar.outputs[0]], to_int32, name="capacity_int32")
    if has_query_lengths:
        query = ir.node("Cast", [new_tokens], to_int32, name="new_tokens_int32")
        tokens, new = new_tokens, query.outputs[0]
    else:
        query = ir.node("Shape", [qkv], {"start": 1, "end": 2}, name="step_tokens")
        tokens, new = query.outputs[0], None
    held = ir.node("Add", [cache_length, tokens], name="tokens_after_step")
    last = ir.node("Sub", [held.outputs[0], one.outputs[0]], name="last_key_int64")
    last_key = ir.node("Cast", [last.outputs[0]], to_int32, name="last_key")
    graph.insert_before(attention, [one, query, held, last, last_key, capacity, scalar, total])
    return _Lengths(last_key.outputs[0], new, total.outputs[0])


def _rotary_tables(graph: ir.Graph, attention: ir.Node) -> list[ir.Value | None]:
    """Cosine and sine [P, D/2] in the dtype of q, k and v, which the kernel wants them in."""
    qkv, *tables = (attention.inputs[index] for index in (0, 3, 4))
    assert qkv is not None and qkv.dtype is not None
    if qkv.dtype == ir.DataType.FLOAT:
        return tables
    to = {"to": qkv.dtype.value}
    casts = [
        ir.node("Cast", [table], to, name=f"rotary_{part}") for part, table in zip(("cos", "sin"), tables, strict=True)
    ]
    graph.insert_before(attention, casts)
    return [cast.outputs[0] for cast in casts]


def fuse_swiglu(traced: Traced) -> int:
    """SwiGLU -> Split, QuickGelu with alpha 1 (which is SiLU, in one pass over memory), Mul. Returns the count."""
    graph = traced.model.graph
    nodes = [node for node in graph if ops.is_op(node, ops.Op.SWIGLU)]
    for node in nodes:
        split = ir.node("Split", node.inputs, {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{node.name}_split")
        gate, up = split.outputs
        for half in (gate, up):
            half.type, half.shape = node.outputs[0].type, node.outputs[0].shape
        silu = ir.node("QuickGelu", [gate], {"alpha": 1.0}, domain=MS_DOMAIN, name=f"{node.name}_silu")
        product = ir.node("Mul", [silu.outputs[0], up], name=f"{node.name}_mul")
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [split, silu, product], node.outputs, product.outputs
        )
    return len(nodes)


def fuse_skip_norm(traced: Traced) -> int:
    """Add whose sum goes into an RMSNormalization -> SkipSimplifiedLayerNormalization. Returns the number of fusions.

    Before: sum = a + b; y = RMSNormalization(sum, gain)     After: the same two values from one node.
    Requires: a and b of one known shape of rank 3 (the kernel doesn't broadcast), fp32, normalised along the last axis.
    """
    graph = traced.model.graph
    fused = 0
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        stream, gain = norm.inputs
        assert stream is not None
        add = stream.producer()
        if add is None or add.op_type != "Add" or not _adds_equal_shapes(add) or not _is_last_axis(norm):
            continue
        new = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, gain],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain=MS_DOMAIN,
            num_outputs=4,
            name=norm.name,
        )
        y, mean, inverse, total = new.outputs
        mean.name = inverse.name = ""  # not computed
        y.type, y.shape = norm.outputs[0].type, norm.outputs[0].shape
        total.type, total.shape = stream.type, stream.shape
        ir.convenience.replace_nodes_and_values(graph, add, [add, norm], [new], [norm.outputs[0], stream], [y, total])
        fused += 1
    return fused


def _adds_equal_shapes(add: ir.Node) -> bool:
    shapes = [value.shape for value in add.inputs if value is not None]
    if any(shape is None or len(shape) != 3 for shape in shapes):
        return False
    return shapes[0] == shapes[1] and not any(value.is_initializer() for value in add.inputs if value is not None)


def _is_last_axis(norm: ir.Node) -> bool:
    axis = norm.attributes.get("axis")
    return axis is None or axis.as_int() == -1


def lower_linear(traced: Traced) -> int:
    """Linear -> MatMul (+ Add) with [K, N] weights. Returns the number of nodes lowered.

    Requires: the weight is used by that node alone.
    Before: y = qwen_aot.Linear(x[..., K], weight[N, K], bias[N]?)
    """
    graph = traced.model.graph
    nodes = [node for node in graph if ops.is_op(node, ops.Op.LINEAR)]
    for node in nodes:
        x, weight, *bias = node.inputs
        assert x is not None and weight is not None and weight.name is not None
        (result,) = node.outputs
        if len(weight.uses()) > 1:
            raise ExportError(f"weight {weight.name} of {node.name} is shared and can't be stored transposed")
        traced.recipes[weight.name] = transpose_recipe(traced.recipes[weight.name])
        assert weight.shape is not None
        weight.shape = ir.Shape(list(reversed(list(weight.shape))))
        new = [ir.node("MatMul", [x, weight])]
        if bias:
            product = new[0].outputs[0]
            product.type, product.shape = result.type, result.shape
            new.append(ir.node("Add", [product, bias[0]]))
        for index, fresh in enumerate(new):
            fresh.name = f"{node.name}_{index}"
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, [result], new[-1].outputs)
    return len(nodes)
