"""The `plugin` lowering: what TensorRT parses where the project's plugins compute attention, experts and projections.

A layer's cached attention is one QwenGQA, its routed experts are one QwenMoE, each projection that is asked for is one
QwenLinear; routing and everything else are the standard lowering's. Each of these nodes has its definition as a
model-local function, so that the graph runs on any ONNX runtime as it is; `strip_definitions` makes what TensorRT
parses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops, plugin_ops
from qwen_aot.exporter.graph.plugin_ops import PLUGIN_ATTRIBUTES, PluginOp, is_plugin
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.lowering.tensorrt.own_codes import refuse_own_experts
from qwen_aot.exporter.lowering.tensorrt.plugin_experts import ExpertBits, expert_bits, plug_experts
from qwen_aot.exporter.lowering.tensorrt.plugin_linear import PLUGIN_LINEAR_FORMS, no_plugin_linear, plug_linears
from qwen_aot.exporter.lowering.tensorrt.plugin_own_experts import own_expert_form
from qwen_aot.exporter.lowering.tensorrt.quantized import WeightFormat, has_blocks, refuse_experts
from qwen_aot.exporter.model.io_spec import TensorSpec, io_spec
from qwen_aot.exporter.quantize.own_codes import PluginExperts
from qwen_aot.exporter.weights.recipe import Traced

logger = logging.getLogger(__name__)

Form = Literal["plugin", "native"]

_BLOCK_OPSET = 21  # the first whose DequantizeLinear has blocks and 4-bit codes


@dataclass(frozen=True, slots=True)
class PluginOptions:
    """What the lowering leaves open.

    Attributes:
        weights: how projections and, by the plugin, experts are stored; None: in the compute type of the trace.
        quantize_head: the head too is stored so.
        attention: by the QwenGQA plugin, or as the standard lowering has it.
        moe: by the QwenMoE plugin, or as the standard lowering has it.
        linear: projections whose weights are codes, by the QwenLinear plugin where it has a form for them; or all as
            the standard lowering has them.
        int8_cache: the plugin's attention keeps keys and values as int8, with a scale for each head and token.
        own_codes: see `StandardOptions`.

    Raises:
        ExportError: a form doesn't exist, or not together with the others.
    """

    weights: WeightFormat | None = None
    quantize_head: bool = False
    attention: Form = "plugin"
    moe: Form = "plugin"
    int8_cache: bool = False
    own_codes: bool = False
    linear: Form = "native"

    def __post_init__(self) -> None:
        for name in ("attention", "moe", "linear"):
            if getattr(self, name) not in get_args(Form):
                raise ExportError(
                    f"{name} {getattr(self, name)!r} doesn't exist; accepted: {', '.join(get_args(Form))}"
                )
        if self.int8_cache and self.attention != "plugin":
            raise ExportError(
                "an int8 cache needs the plugin's attention: ONNX's own reads keys and values in the compute type "
                "alone; choose attention plugin, or a cache in the compute type"
            )

        if self.linear == "plugin" and not self.own_codes and self.weights not in PLUGIN_LINEAR_FORMS:
            raise no_plugin_linear(self.weights)

    @property
    def standard(self) -> standard.StandardOptions:
        """The part that both lowerings share."""
        return standard.StandardOptions(self.weights, self.quantize_head, self.own_codes)


def lower(traced: Traced, options: PluginOptions | None = None) -> Traced:
    """Lowers in place and returns the same object.

    Raises:
        ExportError: the options ask for what this graph can't be lowered to.
    """
    options = options or PluginOptions()
    if options.weights is not None and options.moe != "plugin":
        refuse_experts(traced, options.weights)
    if options.own_codes and options.moe != "plugin":
        refuse_own_experts(traced)
    own = own_expert_form(traced) if options.own_codes and options.moe == "plugin" else None
    bits = expert_bits(traced, options.weights) if options.moe == "plugin" else None
    for name, step in passes(options, bits, own):
        count = step(traced)
        if count:
            logger.info("%s: %d", name, count)
    traced.model.metadata_props["qwen_aot.lowering"] = "plugin"
    return traced


def passes(
    options: PluginOptions, bits: ExpertBits | None, own: PluginExperts | None = None
) -> list[tuple[str, Callable[[Traced], int]]]:
    """The passes in order, by name.

    Args:
        options: of the lowering.
        bits: of an expert's weight; None: experts stay as the standard lowering has them.
        own: the form of experts that keep the checkpoint's codes; None: they have none.
    """
    opset = _BLOCK_OPSET if options.own_codes or has_blocks(options.weights) else plugin_ops.OPSET
    steps = standard.quantizing_passes(options.standard)  # first: a router is told by the experts that it feeds
    if options.linear == "plugin":
        names = [name for name, _ in steps]
        place = names.index("order_columns") + 1 if options.own_codes else 0  # what it leaves, the next ones store
        weights, quantize_head = options.weights, options.quantize_head
        steps.insert(place, ("plug_linears", lambda traced: plug_linears(traced, weights, quantize_head=quantize_head)))
    if options.attention == "plugin":
        steps.append(("plug_attention", lambda traced: plug_attention(traced, int8_cache=options.int8_cache)))
    if bits is not None:
        steps.append(("plug_experts", lambda traced: plug_experts(traced, bits, own)))
    steps += standard.common_passes()
    if options.attention == "plugin":
        steps += [
            ("lower_norms", lower_norms),
            ("lower_opset", lambda traced: lower_opset(traced, opset)),  # nothing newer is left
        ]
    return [*steps, ("attach_definitions", attach_definitions)]  # last: what is attached earlier would be inlined


def plug_attention(traced: Traced, *, int8_cache: bool) -> int:
    """CachedAttention -> QwenGQA, without the mask. Returns the number of nodes replaced.

    An int8 cache changes the graph's inputs and outputs: past and present become int8, and scales stand behind them.
    """
    graph = traced.model.graph
    nodes = [node for node in graph if ops.is_op(node, ops.Op.CACHED_ATTENTION)]
    if int8_cache and nodes:
        _make_cache_int8(traced)
    for node in nodes:
        inputs = list(node.inputs[:8])
        if int8_cache:
            inputs += [_io_value(graph.inputs, f"{past.name}_scale") for past in inputs[1:3] if past is not None]
        inputs += node.inputs[9:]  # gains of the heads' norms
        epsilon = node.attributes.get("norm_epsilon")
        new = ir.node(
            PluginOp.GQA,
            inputs,
            {
                **{name: node.attributes[name].as_int() for name in ("num_heads", "num_kv_heads", "head_dim")},
                "cache_bits": 8 if int8_cache else 16,
                "norm_epsilon": 0.0 if epsilon is None else epsilon.as_float(),
                "scale": node.attributes["scale"].as_float(),
            },
            domain=ops.DOMAIN,
            num_outputs=5 if int8_cache else 3,
            name=node.name,
        )
        for made, replaced in zip(new.outputs, node.outputs, strict=False):
            made.type, made.shape = replaced.type, replaced.shape
        _, key, value = node.outputs
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs[:3])
        for present, scale in zip((key, value), new.outputs[3:], strict=False):
            _replace_output(graph, _io_value(graph.outputs, f"{present.name}_scale"), scale)
    return len(nodes)


def _make_cache_int8(traced: Traced) -> None:
    """Past and present become int8 (their producers are about to be replaced); scales of no producer join them."""
    graph = traced.model.graph
    first = _io_value(graph.inputs, "past_key_values.0.key")
    assert first.shape is not None
    capacity = first.shape[2]
    spec = io_spec(traced.config, ir.DataType.INT8, capacity if isinstance(capacity, int) else None)
    for values, layers in ((graph.inputs, spec.past), (graph.outputs, spec.present)):
        known = {value.name: value for value in values}
        cache = [_cache_value(known.pop(tensor.name, None), tensor) for parts in layers for tensor in parts]
        others = list(known.values())
        values.clear()
        values.extend([*others, *cache])


def _cache_value(known: ir.Value | None, spec: TensorSpec) -> ir.Value:
    value = known or ir.Value(name=spec.name, shape=ir.Shape(spec.dims))
    value.type = ir.TensorType(spec.dtype)
    return value


def _io_value(values: Sequence[ir.Value], name: str) -> ir.Value:
    return next(value for value in values if value.name == name)


def _replace_output(graph: ir.Graph, placeholder: ir.Value, made: ir.Value) -> None:
    """Puts what a node made in the place of an output that nothing did."""
    made.name, made.type, made.shape = placeholder.name, placeholder.type, placeholder.shape
    graph.outputs[list(graph.outputs).index(placeholder)] = made


def lower_norms(traced: Traced) -> int:
    """RMSNormalization, of opset 23, -> x / sqrt(mean(x²) + epsilon) · gain. Returns the number of nodes lowered.

    Requires: the last axis.
    """
    graph = traced.model.graph
    nodes = [node for node in graph if node.op_type == "RMSNormalization"]
    for node in nodes:
        x, gain = node.inputs
        if node.attributes["axis"].as_int() != -1:
            raise ExportError(f"{node.name} normalises another axis than the last")

        epsilon = np.array(node.attributes["epsilon"].as_float(), np.float32)
        axes = _named(node, "axes", "Constant", [], value=ir.tensor(np.array([-1], np.int64)))
        step = _named(node, "epsilon", "Constant", [], value=ir.tensor(epsilon))
        square = _named(node, "square", "Mul", [x, x])
        mean = _named(node, "mean", "ReduceMean", [square.outputs[0], axes.outputs[0]], keepdims=1)
        raised = _named(node, "raised", "Add", [mean.outputs[0], step.outputs[0]])
        root = _named(node, "root", "Sqrt", raised.outputs)
        unit = _named(node, "unit", "Div", [x, root.outputs[0]])
        scaled = ir.node("Mul", [unit.outputs[0], gain], name=node.name)
        new = [axes, step, square, mean, raised, root, unit, scaled]
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, scaled.outputs)
    return len(nodes)


def _named(node: ir.Node, part: str, op: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Node:
    """A node that stands for a part of another one."""
    return ir.node(op, inputs, attributes, name=f"{node.name}_{part}")


def lower_opset(traced: Traced, opset: int) -> int:
    """Declares the oldest opset that has what is left in the graph, for older parsers. Returns 1 if that is new.

    The ONNX checker, which every written graph passes, refuses ops that the opset doesn't have.
    """
    imports = traced.model.graph.opset_imports
    changed = imports[""] != opset
    imports[""] = opset
    return int(changed)


def attach_definitions(traced: Traced) -> int:
    """Gives the model the definition of each plugin op that it uses. Returns the number of definitions."""
    model, config = traced.model, traced.config
    opset = model.graph.opset_imports[""]
    attached = 0
    for node in model.graph:
        if not is_plugin(node) or node.op_identifier() in model.functions:
            continue
        attributes = node.attributes
        if node.op_type == PluginOp.GQA:
            definition = plugin_ops.gqa_definition(
                num_heads=attributes["num_heads"].as_int(),
                num_kv_heads=attributes["num_kv_heads"].as_int(),
                head_dim=attributes["head_dim"].as_int(),
                scale=attributes["scale"].as_float(),
                int8_cache=attributes["cache_bits"].as_int() == 8,
                norm_epsilon=attributes["norm_epsilon"].as_float(),
                opset=opset,
            )
        elif node.op_type == PluginOp.LINEAR:
            definition = plugin_ops.linear_plugin_definition(
                weight_bits=attributes["weight_bits"].as_int(),
                has_zeros=bool(attributes["has_zeros"].as_int()),
                has_bias=bool(attributes["has_bias"].as_int()),
                opset=opset,
            )
        else:
            assert config.moe is not None
            definition = plugin_ops.moe_definition(
                hidden_size=config.hidden_size,
                intermediate_size=config.moe.moe_intermediate_size,
                num_experts=attributes["num_experts"].as_int(),
                experts_per_token=attributes["experts_per_token"].as_int(),
                weight_bits=attributes["weight_bits"].as_int(),
                has_zeros=bool(attributes["has_zeros"].as_int()),
                opset=opset,
            )
        model.functions[definition.identifier()] = definition
        attached += 1
    return attached


def strip_definitions(traced: Traced) -> int:
    """Makes of a lowered graph what TensorRT parses, in place. Returns the number of plugin nodes.

    The parser would take a node apart that has a definition; without one it looks for a plugin of the op's name, in the
    namespace and version that two attributes name.
    """
    nodes = [node for node in traced.model.graph if is_plugin(node)]
    for node in nodes:
        traced.model.functions.pop(node.op_identifier(), None)
        node.overload = ""  # of the definition
        for name, value in PLUGIN_ATTRIBUTES.items():
            node.attributes[name] = ir.AttrString(name, value)
    return len(nodes)
