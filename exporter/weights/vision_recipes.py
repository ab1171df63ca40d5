"""Which checkpoint tensors make each initializer of the traced vision engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.exporter.model.vision import CHANNELS, GRID, PIXEL_MEAN, PIXEL_STD, VisionConfig
from qwen_aot.exporter.model.vision_tensors import Making, VisionParameter, vision_parameters
from qwen_aot.exporter.weights.recipe import Arrays, Output, Recipe, Source, cast_to

_CUBIC = -0.75  # the parameter of the cubic kernel, as torch.nn.functional.interpolate has it
_THIRDS = {Making.FIRST_THIRD: 0, Making.SECOND_THIRD: 1, Making.LAST_THIRD: 2}


def vision_recipes(config: VisionConfig, dtype: ir.DataType) -> dict[str, Recipe]:
    """A recipe for every initializer of the trace, by its name.

    Args:
        config: the tower's facts.
        dtype: compute type; what stays float32 is `VisionParameter.is_fp32`.
    """
    recipes = [*_pixel_recipes(), *(_recipe(parameter, config, dtype) for parameter in vision_parameters(config))]
    return {recipe.outputs[0].name: recipe for recipe in recipes}


def deinterleaved(heads: int, width: int) -> NDArray[np.int64]:
    """The rows [3 * width] of a projection that stores each head's q, k and v together, in the order q, k, v.

    Source: the published code views the product as [heads, 3 * head size] and splits the last axis.
    """
    rows = np.arange(3 * width, dtype=np.int64).reshape(heads, 3, width // heads)
    return np.ascontiguousarray(rows.transpose(1, 0, 2)).reshape(-1)


@functools.cache
def resize_matrix(target: int) -> NDArray[np.float64]:
    """The matrix [target, GRID] that resizes a line of GRID samples to `target` by cubic convolution.

    Samples lie in the middle of their pixels, and those beyond an end are that end's; nothing is smoothed first where
    the line becomes shorter.
    Source: Keys, "Cubic Convolution Interpolation for Digital Image Processing" (1981), with a = -0.75, as
    torch.nn.functional.interpolate(mode="bicubic", align_corners=False) has it.
    """
    centers = (np.arange(target) + 0.5) * GRID / target - 0.5
    first = np.floor(centers).astype(np.int64)
    matrix = np.zeros((target, GRID))
    for tap in range(-1, 3):
        source = first + tap
        np.add.at(matrix, (np.arange(target), source.clip(0, GRID - 1)), _cubic_kernel(np.abs(centers - source)))
    return matrix


def _cubic_kernel(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    a, d = _CUBIC, distance
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def resized(table: NDArray[np.float32], grid: int) -> NDArray[np.float32]:
    """A table [GRID * GRID, N] of positions, for a grid of other size: [grid * grid, N]."""
    if grid == GRID:
        return table
    matrix = resize_matrix(grid)
    square = table.astype(np.float64).reshape(GRID, GRID, -1)
    rows = np.einsum("yi,ijn->yjn", matrix, square)
    both: NDArray[np.float64] = np.einsum("xj,yjn->yxn", matrix, rows)
    return both.reshape(grid * grid, -1).astype(np.float32)


def _pixel_recipes() -> Iterator[Recipe]:
    """(pixel / 255 - mean) / deviation as pixel * scale + shift: two vectors that no checkpoint holds."""
    mean, deviation = np.array(PIXEL_MEAN), np.array(PIXEL_STD)
    for name, values in (("pixel_scale", 1 / (255 * deviation)), ("pixel_shift", -mean / deviation)):
        yield Recipe((), (Output(f"vision.{name}", ir.DataType.FLOAT, (CHANNELS,)),), _values_at(values))


def _values_at(values: NDArray[np.float64]) -> Callable[[NDArray[np.float32]], Arrays]:
    return lambda rows: (values[rows.astype(np.int64)].astype(np.float32),)


def _recipe(parameter: VisionParameter, config: VisionConfig, dtype: ir.DataType) -> Recipe:
    tensor, making = parameter.tensor, parameter.making
    stored = ir.DataType.FLOAT if parameter.is_fp32 else dtype
    order, group = None, 1
    cast = cast_to(stored)
    change: Callable[[NDArray[Any]], NDArray[Any]] = lambda rows: rows  # noqa: E731  (one of several)
    if making is Making.DEINTERLEAVED:
        order = deinterleaved(config.heads, config.width)
    elif making in _THIRDS:
        third = tensor.shape[0] // 3
        order = np.arange(third, dtype=np.int64) + _THIRDS[making] * third
    elif making is Making.FLATTENED:
        change = lambda rows: rows.reshape(len(rows), -1)  # noqa: E731
    elif making is Making.RESIZED:
        group = GRID**2  # every row is made of all
        change = lambda rows: resized(rows, config.grid)  # noqa: E731
    return Recipe(
        (Source(tensor.name, tensor.shape, row_order=order),),
        (Output(f"vision.{parameter.name}", stored, parameter.shape),),
        lambda rows: cast(change(rows)),
        rows_per_group=group,
    )
