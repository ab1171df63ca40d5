"""Which checkpoint tensors make each initializer of the traced decoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.position_tables import PositionTables, query_scales, rotary_rows
from qwen_aot.exporter.model.tensors import Parameter, Role, WeightClass, placed_parameters
from qwen_aot.exporter.weights.recipe import Output, Recipe, Source, Transform, cast_to


def decoder_recipes(config: ModelConfig, dtype: ir.DataType, tables: PositionTables) -> dict[str, Recipe]:
    """A recipe for every initializer of the trace, by its name.

    Args:
        config: the model's facts.
        dtype: compute type of projections and embedding; norms and tables of positions are float32.
        tables: which of these the graph reads.
    """
    recipes: list[Recipe] = []
    for parameter, layer in placed_parameters(config):
        recipes.append(_stack(parameter, layer, dtype))
        if parameter.roles == (Role.EMBEDDING,):  # as the traced decoder has them, and so their order in the file
            recipes += _position_tables(config, tables)
    return {recipe.outputs[0].name: recipe for recipe in recipes}


def _stack(parameter: Parameter, layer: int | None, dtype: ir.DataType) -> Recipe:
    """Tensors stacked along their rows and cast, viewed in the parameter's shape."""
    stored = ir.DataType.FLOAT if parameter.weight_class is WeightClass.NORM else dtype
    sources = tuple(Source(tensor.name, tensor.shape) for tensor in parameter.tensors(layer))
    return Recipe(sources, (Output(parameter.name(layer), stored, parameter.shape),), cast_to(stored))


def _position_tables(config: ModelConfig, tables: PositionTables) -> Iterator[Recipe]:
    """The tables that no checkpoint holds."""
    for name, function in (("model.rotary.cos", np.cos), ("model.rotary.sin", np.sin)):
        table = Output(name, ir.DataType.FLOAT, (tables.rotary_rows, config.head_dim // 2))
        yield Recipe((), (table,), _rotary_table(config, tables.positions, function))
    if tables.scales_queries:
        scales = Output("model.query_scales", ir.DataType.FLOAT, (tables.positions, 1))
        yield Recipe((), (scales,), lambda rows: (query_scales(config, rows.astype(np.int64))[:, None],))


def _rotary_table(config: ModelConfig, positions: int, function: np.ufunc) -> Transform:
    """Row indices [r] -> [r, D/2]."""
    return lambda rows: (rotary_rows(config, positions, rows.astype(np.int64), function),)
