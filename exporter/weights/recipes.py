"""Which checkpoint tensors make each initializer of the traced decoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.rope import inverse_frequencies
from qwen_aot.exporter.model.tensors import Parameter, Role, WeightClass, placed_parameters
from qwen_aot.exporter.weights.recipe import Output, Recipe, Source, Transform, cast_to

_ROTARY_ROWS = 4096  # positions computed at once, in float64


def decoder_recipes(config: ModelConfig, dtype: ir.DataType, positions: int) -> dict[str, Recipe]:
    """A recipe for every initializer of the trace, by its name.

    Args:
        config: the model's facts.
        dtype: compute type of projections and embedding; norms and rotary tables are float32.
        positions: rows of the rotary tables.
    """
    recipes: list[Recipe] = []
    for parameter, layer in placed_parameters(config):
        recipes.append(_stack(parameter, layer, dtype))
        if parameter.roles == (Role.EMBEDDING,):  # as the traced decoder has them, and so their order in the file
            recipes += _rotary(config, positions)
    return {recipe.outputs[0].name: recipe for recipe in recipes}


def _stack(parameter: Parameter, layer: int | None, dtype: ir.DataType) -> Recipe:
    """Tensors stacked along their rows and cast, viewed in the parameter's shape."""
    stored = ir.DataType.FLOAT if parameter.weight_class is WeightClass.NORM else dtype
    sources = tuple(Source(tensor.name, tensor.shape) for tensor in parameter.tensors(layer))
    return Recipe(sources, (Output(parameter.name(layer), stored, parameter.shape),), cast_to(stored))


def _rotary(config: ModelConfig, positions: int) -> Iterator[Recipe]:
    """The two tables that no checkpoint holds."""
    for name, function in (("model.rotary.cos", np.cos), ("model.rotary.sin", np.sin)):
        table = Output(name, ir.DataType.FLOAT, (positions, config.head_dim // 2))
        yield Recipe((), (table,), _rotary_table(config, function))


def _rotary_table(config: ModelConfig, function: np.ufunc) -> Transform:
    """Cosine or sine of position x frequency, positions [r] -> [r, D/2]; angles are float32 as in transformers."""

    def transform(positions: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        frequencies, attention_scaling = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        table = np.empty((len(positions), config.head_dim // 2), np.float32)
        for first in range(0, len(positions), _ROTARY_ROWS):
            part = slice(first, first + _ROTARY_ROWS)
            angles = positions[part, None] * frequencies.astype(np.float32)
            table[part] = function(angles.astype(np.float64)) * attention_scaling
        return (table,)

    return transform
