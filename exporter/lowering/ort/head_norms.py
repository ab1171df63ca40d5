"""Norms of heads in front of GroupQueryAttention, whose CPU kernel refuses to compute them.

The kernel's inputs `q_norm_weight` and `k_norm_weight` are for the CUDA and WebGPU providers alone (so says the error
of ONNX Runtime 1.32's CPU kernel). Queries and keys are cut out of the projection's result and are not put together
with the values again: the kernel takes the three apart as well.
"""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir

from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.weights.recipe import Traced

_OP = "HeadNorms"  # of our domain, but only until definitions are inlined
_GAINS = slice(9, 11)  # inputs of CachedAttention


def has_norms(attention: ir.Node) -> bool:
    """Whether a CachedAttention normalises its queries and keys."""
    return attention.overload == ops.overload_of(ops.Op.CACHED_ATTENTION, _GAINS.stop)


def normalised(traced: Traced, attention: ir.Node) -> list[ir.Value | None]:
    """Queries [B, S, H·D] and keys [B, S, Hkv·D], normalised, and values [B, S, Hkv·D] of a CachedAttention with norms.

    They are made by a node in front of it, whose definition the model gets.
    """
    num_heads, num_kv_heads, head_dim = (
        attention.attributes[name].as_int() for name in ("num_heads", "num_kv_heads", "head_dim")
    )
    qkv = attention.inputs[0]
    assert qkv is not None and qkv.dtype is not None and qkv.shape is not None
    definition = _definition(
        num_heads, num_kv_heads, head_dim, attention.attributes["norm_epsilon"].as_float(), qkv.dtype
    )
    traced.model.functions[definition.identifier()] = definition
    node = ir.node(
        _OP, [qkv, *attention.inputs[_GAINS]], domain=ops.DOMAIN, num_outputs=3, name=f"{attention.name}_head_norms"
    )
    for part, heads in zip(node.outputs, (num_heads, num_kv_heads, num_kv_heads), strict=True):
        part.dtype, part.shape = qkv.dtype, ir.Shape([*list(qkv.shape)[:2], heads * head_dim])
    traced.model.graph.insert_before(attention, node)
    return list(node.outputs)


def _definition(num_heads: int, num_kv_heads: int, head_dim: int, epsilon: float, dtype: ir.DataType) -> ir.Function:
    """Each head in fp32, rounded to the type of the projection's result. Source: `ops.cached_attention_definition`."""
    widths = ", ".join(str(heads * head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads))
    text = f"""<domain: "{ops.DOMAIN}", opset_import: ["" : {ops.OPSET}]>
        {_OP} (qkv, q_norm, k_norm) => (query, key, value) {{
            widths = Constant <value_ints = [{widths}]> ()
            all_queries, all_keys, value = Split <axis = -1> (qkv, widths)
            {_norm("all_queries", "q_norm", "query", num_heads, head_dim, epsilon, dtype)}
            {_norm("all_keys", "k_norm", "key", num_kv_heads, head_dim, epsilon, dtype)}
        }}"""
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def _norm(x: str, gain: str, result: str, heads: int, head_dim: int, epsilon: float, dtype: ir.DataType) -> str:
    wide, narrowed = x, ""
    if dtype != ir.DataType.FLOAT:
        wide = f"{x}_wide"
        narrowed = f"{result} = Cast <to = {dtype.value}> ({result}_exact)"
    exact = f"{result}_exact" if narrowed else result
    cast = f"{wide} = Cast <to = {ir.DataType.FLOAT.value}> ({x})" if narrowed else ""
    return f"""
            {cast}
            {x}_by_head = Constant <value_ints = [0, 0, {heads}, {head_dim}]> ()
            {x}_heads = Reshape ({wide}, {x}_by_head)
            {x}_normed = RMSNormalization <axis = -1, epsilon = {epsilon!r}> ({x}_heads, {gain})
            {x}_flat = Constant <value_ints = [0, 0, {heads * head_dim}]> ()
            {exact} = Reshape ({x}_normed, {x}_flat)
            {narrowed}
    """
