"""Initializers that are made of a checkpoint's own codes, and of no floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import EncodedRows, dequantize
from qwen_aot.exporter.quantize.encoded import may_overflow
from qwen_aot.exporter.weights.recipe import Arrays, OutOfRangeError, Output, Recipe, Traced


def initializers_of_codes(
    traced: Traced, recipe: Recipe, outputs: Sequence[Output], stored: Callable[[EncodedRows, int], Arrays]
) -> list[ir.Value]:
    """New initializers, and their recipe, of the codes of a float weight's tensors.

    Args:
        traced: worked on in place.
        recipe: of the float weight, whose range the values are held to.
        outputs: what is made.
        stored: some rows of a tensor's codes, and the number of the first in its chunk -> one array an output.
    """

    def from_codes(parts: Sequence[EncodedRows]) -> Arrays:
        made, first_row = [], 0
        for part in parts:
            require_range(part, recipe, first_row)
            made.append(stored(part, first_row))
            first_row += len(part.codes)
        return tuple(
            np.concatenate(arrays, axis=output.row_axis)
            for arrays, output in zip(zip(*made, strict=True), outputs, strict=True)
        )

    def transform(_: NDArray[np.float32]) -> Arrays:
        raise AssertionError("the codes of this weight are kept")

    traced.recipes[outputs[0].name] = Recipe(
        recipe.sources, tuple(outputs), transform, recipe.rows_per_group, from_codes
    )
    values = [ir.Value(name=each.name, type=ir.TensorType(each.dtype), shape=ir.Shape(each.shape)) for each in outputs]
    for value in values:
        traced.model.graph.initializers.add(value)
    return values


def require_range(part: EncodedRows, recipe: Recipe, first_row: int) -> None:
    """Refuses values that the compute type can't hold, as `recipe` of the float weight does.

    Raises:
        OutOfRangeError: names the row of the chunk, in which the part's first row is `first_row`.
    """
    if not may_overflow(part):
        return
    try:
        recipe.transform(dequantize(part))
    except OutOfRangeError as error:
        raise OutOfRangeError(first_row + error.row, error.reason) from error
