"""Trace of the vision engine: its configuration becomes an ONNX graph, as the decoder's does in `trace`."""

from __future__ import annotations

import logging
import warnings

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.graph.repeat import LayerRepeater
from qwen_aot.exporter.graph.trace import IR_VERSION, PRODUCER, TORCH_DTYPES
from qwen_aot.exporter.graph.vision_modeling import VisionTower
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.io_spec import vision_io_spec
from qwen_aot.exporter.model.tensors import tensor_shapes
from qwen_aot.exporter.model.vision import VisionConfig
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.vision_recipes import vision_recipes
from qwen_aot.version import __version__


def trace_vision(config: ModelConfig, dtype: ir.DataType = ir.DataType.FLOAT) -> Traced:
    """Traces the tower and the resampler of a model that has them.

    Args:
        config: the model's facts.
        dtype: compute type (FLOAT, FLOAT16, BFLOAT16) of projections and attention.

    Returns:
        The graph (inputs and outputs: `vision_io_spec`), its recipes, and definitions of our ops as local functions.

    Raises:
        ExportError: the model takes no images, or the traced graph isn't what this module expects of it.
    """
    vision = config.vision
    if vision is None:
        raise ExportError(f"a model of type {config.model_type} has no vision tower to trace")
    if dtype not in TORCH_DTYPES:
        raise ExportError(f"compute type {dtype.name} can't be traced; accepted: FLOAT, FLOAT16, BFLOAT16")
    spec = vision_io_spec(vision)
    repeater = LayerRepeater(_export(vision, TORCH_DTYPES[dtype]), 1, spec.inputs, "vision.{}".format)
    before, (layer,), after = repeater.partition()
    repeater.bind("pixels", "pixels")
    repeater.copy(before, "")
    stream = repeater.residual_stream(layer, vision.width)
    result = _result(layer, after)
    for index in range(vision.layers):
        repeater.copy(layer, f"layers.{index}.", index)
        repeater.values[stream] = repeater.values[result]
    repeater.copy(after, "")
    model = ir.Model(
        repeater.graph([repeater.name_output(0, spec.outputs[0])], "vision"),
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
        producer_version=__version__,
    )
    model.metadata_props.update(
        {
            "qwen_aot.model_type": config.model_type,
            "qwen_aot.compute_dtype": dtype.name.lower(),
            "qwen_aot.num_hidden_layers": str(vision.layers),
            "qwen_aot.torch": torch.__version__,
        }
    )
    for definition in (ops.linear_definition(has_bias=False), ops.linear_definition(has_bias=True)):
        model.functions[definition.identifier()] = definition
    return Traced(model, config, vision_recipes(vision, dtype), elsewhere=frozenset(tensor_shapes(config)))


def _export(config: VisionConfig, dtype: torch.dtype) -> ir.Graph:
    (pixels,), (embeddings,) = vision_io_spec(config).inputs, vision_io_spec(config).outputs
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            VisionTower(config, dtype).eval(),
            (torch.zeros(3, config.image_size, config.image_size, 3),),
            input_names=[pixels.name],
            output_names=[embeddings.name],
            dynamic_shapes=({0: "B"},),
            opset_version=ops.OPSET,
            custom_opsets={ops.DOMAIN: ops.VERSION},
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    return program.model.graph


def _result(layer: list[ir.Node], after: list[ir.Node]) -> ir.Value:
    """What the nodes behind the layer take from it."""
    made = {value for node in layer for value in node.outputs}
    taken = {value for node in after for value in node.inputs if value in made}
    if len(taken) != 1:
        raise ExportError(f"a traced layer should give the residual stream and nothing else, but gives {len(taken)}")
    return taken.pop()
