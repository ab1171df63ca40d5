"""Trace: a configuration becomes an ONNX graph of high-level ops, without loading a weight.

One layer of each kind (dense, with experts, last) is traced under fake tensors and then repeated in the graph, so that
tracing takes seconds whatever the depth.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.graph.modeling import Decoder
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.experts import gather_limit
from qwen_aot.exporter.model.io_spec import ROTARY_OFFSET, IoSpec, TensorSpec, io_spec
from qwen_aot.exporter.model.position_tables import PositionTables, position_tables
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.recipes import decoder_recipes
from qwen_aot.version import __version__

PRODUCER = "qwen-aot"  # of every graph of ours, in the file itself
IR_VERSION = 10  # the lowest with 4-bit integers and function overloads, so that older parsers still read the file

_TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
_LAYER_SCOPE = re.compile(r"layers\.(\d+)")
_TEMPLATE_NAME = re.compile(r"^layers\.(\d+)\.")
_CACHE_NAME = re.compile(r"^(past_key_values|present)\.(\d+)\.(key|value)$")


def trace(
    config: ModelConfig,
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    positions: int | None = None,
    context: int | None = None,
    capacity: int | None = None,
    speculates: bool = False,
    gather_up_to_tokens: int | None = None,
) -> Traced:
    """Traces the decoder that `config` describes.

    Args:
        config: the model's facts.
        dtype: compute type (FLOAT, FLOAT16, BFLOAT16) of projections, attention and cache.
        positions: rows of the tables of positions, at least the cache's capacity; None: `max_position_embeddings`.
        context: tokens of the longest sequence; None: `max_position_embeddings`, or `positions` if these are fewer.
        capacity: cache capacity C in tokens where the target fixes it; None leaves it dynamic.
        speculates: a step can give the logits of each row's last tokens (`io_spec`).
        gather_up_to_tokens: for SparseMoE's definition (see `ops.sparse_moe_definition`); None: by its cost.

    Returns:
        The graph (inputs and outputs: `io_spec`), its recipes, and definitions of our ops as local functions.

    Raises:
        ExportError: the traced graph isn't what this module expects of it.
    """
    if dtype not in _TORCH_DTYPES:
        raise ExportError(f"compute type {dtype.name} can't be traced; accepted: FLOAT, FLOAT16, BFLOAT16")
    positions = positions or config.max_position_embeddings
    tables = position_tables(config, context or min(positions, config.max_position_embeddings), positions)
    templates = _templates(config)
    graph = _export(config, dtype, templates, tables, speculates)
    rotary_length = config.dynamic_ntk_length if tables.rotary_tables > 1 else None
    spec = io_spec(config, dtype, capacity, speculates=speculates, rotary_length=rotary_length)
    full = _Repeater(graph, config, templates, spec).build()
    model = ir.Model(full, ir_version=IR_VERSION, producer_name=PRODUCER, producer_version=__version__)
    model.metadata_props.update(
        {
            "qwen_aot.model_type": config.model_type,
            "qwen_aot.compute_dtype": dtype.name.lower(),
            "qwen_aot.num_hidden_layers": str(config.num_hidden_layers),
            "qwen_aot.torch": torch.__version__,
        }
    )
    _attach_definitions(model, config, dtype, capacity, gather_up_to_tokens)
    return Traced(model, config, decoder_recipes(config, dtype, tables))


@dataclass(frozen=True, slots=True)
class _Templates:
    """The layers that are traced, and which of them stands for each layer of the model."""

    sparse: tuple[bool, ...]  # one entry a traced layer; the last is the model's last layer
    of_layer: tuple[int, ...]


def _templates(config: ModelConfig) -> _Templates:
    sparse_layers = config.moe.sparse_layers if config.moe is not None else frozenset()
    kinds = [layer in sparse_layers for layer in range(config.num_hidden_layers)]
    inner = list(dict.fromkeys(kinds[:-1]))
    return _Templates((*inner, kinds[-1]), (*(inner.index(kind) for kind in kinds[:-1]), len(inner)))


def _export(
    config: ModelConfig, dtype: ir.DataType, templates: _Templates, tables: PositionTables, speculates: bool
) -> ir.Graph:
    torch_dtype = _TORCH_DTYPES[dtype]
    count = len(templates.sparse)
    spec = io_spec(config, dtype, speculates=speculates)
    B, S, C, W, T = 3, 7, 64, 23, 5  # any sizes above 1 that differ from each other
    optional: dict[str, tuple[str, int]] = {}  # the decoder's other arguments
    if speculates:
        optional["logits_positions"] = ("T", T)
    if tables.rotary_tables > 1:
        optional[ROTARY_OFFSET] = ("B", B)
    names = [tensor.name for tensor in spec.step if tensor.name not in optional]
    dynamic: dict[str, object] = {
        "input_ids": {0: "B", 1: "S"},
        "position_ids": {0: "B", 1: "S"},
        "cache_length": {0: "B"},
        "new_tokens": {0: "B"},
        "key_positions": {0: "W"},
        "past": [({0: "B", 2: "C"},) * 2] * count,
    }
    logits_names = [tensor.name for tensor in spec.outputs if "." not in tensor.name]
    cache_names = [f"{{}}.{i}.{part}" for i in range(count) for part in ("key", "value")]
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        # torch warns that axes share a name (they are meant to), of its own deprecations, and without torchvision.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        decoder = Decoder(config, torch_dtype, templates.sparse, tables).eval()

        def int64(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int64)

        def cache() -> torch.Tensor:
            return torch.zeros(B, config.num_key_value_heads, C, config.head_dim, dtype=torch_dtype)

        past = [(cache(), cache()) for _ in range(count)]
        program = torch.onnx.export(
            decoder,
            (int64(B, S), int64(B, S), int64(B), int64(B), int64(W), past),
            kwargs={name: int64(size) for name, (_, size) in optional.items()},
            input_names=names + [name.format("past_key_values") for name in cache_names] + list(optional),
            output_names=logits_names + [name.format("present") for name in cache_names],
            dynamic_shapes=dynamic | {name: {0: letter} for name, (letter, _) in optional.items()},
            opset_version=ops.OPSET,
            custom_opsets={ops.DOMAIN: ops.VERSION},
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    return program.model.graph


def _initializer_name(traced_name: str) -> str:
    """A parameter of `modeling.Decoder` -> the name of its recipe."""
    fixed = {
        "embed_tokens": "model.embed_tokens.weight",
        "rotary_cos": "model.rotary.cos",
        "rotary_sin": "model.rotary.sin",
        "query_scales": "model.query_scales",
        "lm_head.weight": "lm_head.weight",
    }
    return fixed.get(traced_name, f"model.{traced_name}")


class _Repeater:
    """Builds the full graph: prologue, a copy of the right template for each layer, epilogue."""

    def __init__(self, traced: ir.Graph, config: ModelConfig, templates: _Templates, spec: IoSpec) -> None:
        self._traced = traced
        self._config = config
        self._templates = templates
        self._spec = spec
        self._logits = spec.outputs[: len(spec.outputs) - 2 * len(spec.present)]
        self._values: dict[ir.Value, ir.Value] = {}  # prologue, inputs and shared initializers, then the running layer
        self._initializers: dict[str, ir.Value] = {}
        self._inputs: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []

    def build(self) -> ir.Graph:
        before, layers, after = self._partition()
        self._inputs = {spec.name: _value(spec.name, spec.dtype, spec.dims) for spec in self._spec.inputs}
        for spec in self._spec.step:
            self._values[self._traced_input(spec.name)] = self._inputs[spec.name]
        self._copy(before, "")
        stream_in = [self._residual_stream(nodes) for nodes in layers]
        present: list[ir.Value] = []
        stream = self._values[stream_in[0]]
        for layer, template in enumerate(self._templates.of_layer):
            self._values[stream_in[template]] = stream
            self._bind_past(layer, template)
            self._copy(layers[template], f"layers.{layer}.", layer)
            present += self._name_present(layer, template)
            if template + 1 < len(stream_in):
                stream = self._values[stream_in[template + 1]]  # what this template gives is what the next one took
        self._copy(after, "")
        logits = [self._name_output(index, spec) for index, spec in enumerate(self._logits)]
        return ir.Graph(
            list(self._inputs.values()),
            [*logits, *present],
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": ops.OPSET, ops.DOMAIN: ops.VERSION},
            name=self._config.model_type,
        )

    def _partition(self) -> tuple[list[ir.Node], list[list[ir.Node]], list[ir.Node]]:
        """Nodes before, in and after the layers, by the module scope that torch recorded."""
        before: list[ir.Node] = []
        after: list[ir.Node] = []
        layers: list[list[ir.Node]] = [[] for _ in self._templates.sparse]
        for node in self._traced:
            match = _LAYER_SCOPE.search(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
            if match is not None:
                layers[int(match[1])].append(node)
            elif any(layers):
                after.append(node)
            else:
                before.append(node)
        if not all(layers):
            raise ExportError("torch.onnx.export recorded no module scope for a layer; is this the pinned torch?")
        return before, layers, after

    def _residual_stream(self, nodes: list[ir.Node]) -> ir.Value:
        """The value a layer takes from what stands before it: its only input from another node as wide as the model.

        The factors of q, k and v, which every layer takes too, are as wide as these.
        """
        made = {value for node in nodes for value in node.outputs}
        taken = {value for node in nodes for value in node.inputs if value is not None and value not in made}
        streams = [value for value in taken if value.producer() is not None and self._is_stream(value)]
        if len(streams) != 1:
            names = sorted(str(value.name) for value in streams)
            raise ExportError(f"a traced layer should take the residual stream and nothing else, but takes {names}")
        return streams[0]

    def _is_stream(self, value: ir.Value) -> bool:
        if value.dtype is None or not value.dtype.is_floating_point():
            return False
        return value.shape is not None and value.shape[-1] == self._config.hidden_size

    def _traced_input(self, name: str) -> ir.Value:
        """By the name of ours; a number behind that of an argument is none of the trace's."""
        traced = ROTARY_OFFSET if name.startswith(ROTARY_OFFSET) else name
        return next(value for value in self._traced.inputs if value.name == traced)

    def _bind_past(self, layer: int, template: int) -> None:
        for part in ("key", "value"):
            self._values[self._traced_input(f"past_key_values.{template}.{part}")] = self._inputs[
                f"past_key_values.{layer}.{part}"
            ]

    def _name_present(self, layer: int, template: int) -> list[ir.Value]:
        first = len(self._logits) + 2 * template
        return [self._name_output(first + part, spec) for part, spec in enumerate(self._spec.present[layer])]

    def _name_output(self, index: int, spec: TensorSpec) -> ir.Value:
        value = self._values[self._traced.outputs[index]]
        value.name, value.shape = spec.name, ir.Shape(spec.dims)
        return value

    def _copy(self, nodes: list[ir.Node], prefix: str, layer: int | None = None) -> None:
        """Appends copies of `nodes`; their results are remembered under the traced values."""
        for node in nodes:
            inputs = [None if value is None else self._input(value, layer) for value in node.inputs]
            outputs = []
            for value in node.outputs:
                copy = ir.Value(name=f"{prefix}{value.name}", type=value.type, shape=_copy_shape(value))
                self._values[value] = copy
                outputs.append(copy)
            self._nodes.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    list(node.attributes.values()),
                    outputs=outputs,
                    overload=ops.overload_of(ops.Op(node.op_type), len(inputs)) if node.domain == ops.DOMAIN else "",
                    name=f"{prefix}{node.name}",
                )
            )

    def _input(self, value: ir.Value, layer: int | None) -> ir.Value:
        if not value.is_initializer():
            return self._values[value]
        assert value.name is not None
        name = _TEMPLATE_NAME.sub(f"layers.{layer}.", value.name)
        name = _initializer_name(name)
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=value.type, shape=_copy_shape(value), const_value=value.const_value
            )
        return self._initializers[name]


def _copy_shape(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape(list(value.shape))


def _value(name: str, dtype: ir.DataType, dims: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


def _attach_definitions(
    model: ir.Model, config: ModelConfig, dtype: ir.DataType, capacity: int | None, gather_up_to_tokens: int | None
) -> None:
    """Gives the model the definition of each of our ops that it uses."""
    definitions: list[ir.Function] = [
        ops.linear_definition(has_bias=False),
        ops.linear_definition(has_bias=True),
        ops.swiglu_definition(),
        ops.cached_attention_definition(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            dtype=dtype,
            capacity=capacity,
            norm_epsilon=config.rms_norm_eps if config.kind.has_head_norms else None,
        ),
    ]
    if config.moe is not None:
        definitions.append(
            ops.sparse_moe_definition(
                hidden_size=config.hidden_size,
                intermediate_size=config.moe.moe_intermediate_size,
                num_experts_per_tok=config.moe.num_experts_per_tok,
                norm_topk_prob=config.moe.norm_topk_prob,
                dtype=dtype,
                gather_up_to_tokens=gather_up_to_tokens or gather_limit(config.moe),
            )
        )
    available: Mapping[ir.OperatorIdentifier, ir.Function] = {f.identifier(): f for f in definitions}
    for node in model.graph:
        if node.op_identifier() in available:
            model.functions[node.op_identifier()] = available[node.op_identifier()]
