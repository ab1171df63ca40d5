"""Recipes: how initializers are made from checkpoint tensors.

A recipe reads one or several checkpoint tensors, stacked along axis 0, a few rows at a time, and turns each chunk of
rows into chunks of one or several initializers (a cast, a transpose, or codes and scales).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.errors import ExportError
from qwen_aot.exporter.model.config import ModelConfig

Transform = Callable[[NDArray[np.float32]], tuple[NDArray[Any], ...]]


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor and the shape that it must have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """One initializer. `row_axis` is the axis along which the source's rows run (its last axis when transposed)."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    row_axis: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the data file, four-bit types packed two to a byte."""
        return int(-(-int(np.prod(self.shape, dtype=np.int64)) * self.dtype.bitwidth // 8))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How some initializers are made.

    Attributes:
        sources: checkpoint tensors of equal trailing shape, stacked along axis 0. Empty for a computed initializer,
            whose transform is called once, with an empty array.
        outputs: what is made.
        transform: a chunk of stacked rows [r, ...] as float32 -> one array an output, in output order, whose row axis
            is proportional to r. It must not depend on how the rows are cut, beyond `rows_per_group`.
        rows_per_group: chunks hold a multiple of this many rows.
    """

    sources: tuple[Source, ...]
    outputs: tuple[Output, ...]
    transform: Transform
    rows_per_group: int = 1

    @property
    def rows(self) -> int:
        """Stacked rows."""
        return sum(source.shape[0] for source in self.sources)


@dataclass(slots=True)
class Traced:
    """A graph, and a recipe for each initializer that comes from the checkpoint or is computed.

    Attributes:
        recipes: by the name of each recipe's first output.
    """

    model: ir.Model
    config: ModelConfig
    recipes: dict[str, Recipe] = field(default_factory=dict)


def cast_to(dtype: ir.DataType) -> Transform:
    """A transform that only changes the dtype. Values that overflow it raise, naming the largest."""
    target = dtype.numpy()
    if dtype == ir.DataType.FLOAT:
        return lambda rows: (rows,)
    largest = float(ml_dtypes.finfo(target).max)  # type: ignore[no-untyped-call]  # its stub has no types

    def transform(rows: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
        magnitude = float(max(rows.max(initial=0.0), -rows.min(initial=0.0)))
        if magnitude > largest:
            raise ExportError(
                f"a weight of magnitude {magnitude:.6g} doesn't fit {dtype.name.lower()} (at most {largest:.6g}); "
                "use a wider compute type (fp32 holds every weight)"
            )
        return (rows.astype(target),)

    return transform


def output_bytes_of(traced: Traced, dtype: ir.DataType) -> int:
    """Bytes of the outputs of one type, padding left out."""
    outputs = (output for recipe in traced.recipes.values() for output in recipe.outputs)
    return sum(output.nbytes for output in outputs if output.dtype == dtype)
