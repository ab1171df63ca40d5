"""Trace: a configuration becomes an ONNX graph of high-level ops, without loading a weight.

One layer of each kind (dense, with experts, last) is traced under fake tensors and then repeated in the graph, so that
tracing takes seconds whatever the depth.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.graph.modeling import Decoder
from qwen_aot.exporter.graph.repeat import LayerRepeater
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.experts import gather_limit
from qwen_aot.exporter.model.io_spec import IMAGE_EMBEDDINGS, IMAGE_POSITIONS, ROTARY_OFFSET, IoSpec, io_spec
from qwen_aot.exporter.model.position_tables import PositionTables, position_tables
from qwen_aot.exporter.model.vision_tensors import vision_tensors
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.recipes import decoder_recipes
from qwen_aot.version import __version__

PRODUCER = "qwen-aot"  # of every graph of ours, in the file itself
IR_VERSION = 10  # the lowest with 4-bit integers and function overloads, so that older parsers still read the file

TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


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
    if dtype not in TORCH_DTYPES:
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
    vision = () if config.vision is None else vision_tensors(config.vision)
    elsewhere = frozenset(tensor.name for tensor in vision)
    return Traced(model, config, decoder_recipes(config, dtype, tables), elsewhere=elsewhere)


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
    torch_dtype = TORCH_DTYPES[dtype]
    count = len(templates.sparse)
    spec = io_spec(config, dtype, speculates=speculates)
    B, S, C, W, T, rows = 3, 7, 64, 23, 5, 11  # any sizes above 1 that differ from each other
    # The decoder's other arguments: the sizes of integers, and the letters of those that vary.
    optional: dict[str, tuple[tuple[int, ...], dict[int, str]]] = {}
    if speculates:
        optional["logits_positions"] = ((T,), {0: "T"})
    if tables.rotary_tables > 1:
        optional[ROTARY_OFFSET] = ((B,), {0: "B"})
    if config.vision is not None:
        optional[IMAGE_EMBEDDINGS] = ((rows, config.hidden_size), {0: "I"})
        optional[IMAGE_POSITIONS] = ((B, S), {0: "B", 1: "S"})
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
        others = {name: int64(*sizes) for name, (sizes, _) in optional.items()}
        if IMAGE_EMBEDDINGS in others:
            others[IMAGE_EMBEDDINGS] = others[IMAGE_EMBEDDINGS].float()
        program = torch.onnx.export(
            decoder,
            (int64(B, S), int64(B, S), int64(B), int64(B), int64(W), past),
            kwargs=others,
            input_names=names + [name.format("past_key_values") for name in cache_names] + list(optional),
            output_names=logits_names + [name.format("present") for name in cache_names],
            dynamic_shapes=dynamic | {name: letters for name, (_, letters) in optional.items()},
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


class _Repeater(LayerRepeater):
    """Builds the full graph: prologue, a copy of the right template for each layer, epilogue."""

    def __init__(self, traced: ir.Graph, config: ModelConfig, templates: _Templates, spec: IoSpec) -> None:
        super().__init__(traced, len(templates.sparse), spec.inputs, _initializer_name)
        self._config = config
        self._templates = templates
        self._spec = spec
        self._logits = spec.outputs[: len(spec.outputs) - 2 * len(spec.present)]

    def build(self) -> ir.Graph:
        """The graph, with its inputs and outputs named as the specification has them."""
        before, layers, after = self.partition()
        for spec in self._spec.step:
            # A number behind the name of an argument is none of the trace's.
            self.bind(ROTARY_OFFSET if spec.name.startswith(ROTARY_OFFSET) else spec.name, spec.name)
        self.copy(before, "")
        stream_in = [self.residual_stream(nodes, self._config.hidden_size) for nodes in layers]
        present: list[ir.Value] = []
        stream = self.values[stream_in[0]]
        for layer, template in enumerate(self._templates.of_layer):
            self.values[stream_in[template]] = stream
            for part in ("key", "value"):
                self.bind(f"past_key_values.{template}.{part}", f"past_key_values.{layer}.{part}")
            self.copy(layers[template], f"layers.{layer}.", layer)
            present += self._name_present(layer, template)
            if template + 1 < len(stream_in):
                stream = self.values[stream_in[template + 1]]  # what this template gives is what the next one took
        self.copy(after, "")
        logits = [self.name_output(index, spec) for index, spec in enumerate(self._logits)]
        return self.graph([*logits, *present], self._config.model_type)

    def _name_present(self, layer: int, template: int) -> list[ir.Value]:
        first = len(self._logits) + 2 * template
        return [self.name_output(first + part, spec) for part, spec in enumerate(self._spec.present[layer])]


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
