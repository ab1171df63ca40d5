"""Compares a configuration with a checkpoint's headers, before anything is made of either."""

from __future__ import annotations

import onnx_ir as ir

from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.model.position_tables import PositionTables
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.recipes import decoder_recipes
from qwen_aot.exporter.weights.stitch import check_sources
from qwen_aot.exporter.weights.vision_recipes import vision_recipes


def check_headers(checkpoint: Checkpoint) -> None:
    """Every tensor that the configuration asks for is there with its shape, and no other is; nothing is read or traced.

    A configuration that lies about sizes would else reach the tracer, and cost what they cost.

    Raises:
        CheckpointError: names the tensor and the rule.
    """
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={}), ir_version=10)
    config = checkpoint.config
    recipes = decoder_recipes(config, ir.DataType.FLOAT, PositionTables(positions=1))
    if config.vision is not None:
        recipes |= vision_recipes(config.vision, ir.DataType.FLOAT)
    check_sources(Traced(empty, config, recipes), checkpoint)
