"""Recipes: how initializers are made from checkpoint tensors.

A recipe reads one or several checkpoint tensors, stacked along axis 0, a few rows at a time, and turns each chunk of
rows into chunks of one or several initializers (a cast, a transpose, or codes and scales). Where the checkpoint stores
codes, a recipe may take these instead of floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, Encoding
from qwen_aot.exporter.checkpoint.storage import Storage
from qwen_aot.exporter.model.config import ModelConfig

Arrays = tuple[NDArray[Any], ...]  # one an output
Transform = Callable[[NDArray[np.float32]], Arrays]
CodesTransform = Callable[[Sequence[EncodedRows]], Arrays]


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint tensor and the shape that it must have.

    Attributes:
        row_order: the recipe gets these of the tensor's rows, in this order; None: all of them, in their own.
        column_order: and its columns in this one [K], which must be that of its codes where these are taken.
    """

    name: str
    shape: tuple[int, ...]
    row_order: NDArray[np.int64] | None = field(default=None, compare=False)
    column_order: NDArray[np.int64] | None = field(default=None, compare=False)

    @property
    def rows(self) -> int:
        """That the recipe gets."""
        return self.shape[0] if self.row_order is None else len(self.row_order)


@dataclass(frozen=True, slots=True)
class Output:
    """One initializer.

    Attributes:
        row_axis: along which the source's rows run (its last axis when transposed).
        tolerance: what a computed one may differ by when another machine computes it, as a share of each element; 0: by
            neighbouring floats.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    row_axis: int = 0
    tolerance: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes in the data file, four-bit types packed two to a byte."""
        return int(-(-int(np.prod(self.shape, dtype=np.int64)) * self.dtype.bitwidth // 8))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How some initializers are made.

    Attributes:
        sources: checkpoint tensors of equal trailing shape, stacked along axis 0. Empty for a computed initializer,
            whose transform gets the indices [r] of a chunk's rows.
        outputs: what is made.
        transform: a chunk of stacked rows [r, ...] as float32 -> one array an output, in output order, whose row axis
            is proportional to r. It must not depend on how the rows are cut, beyond `rows_per_group`.
        rows_per_group: chunks hold a multiple of this many rows.
        from_codes: not None: all sources are read as codes, and this is called in the place of `transform`, with the
            chunk's rows of each source that it reaches, in order.
    """

    sources: tuple[Source, ...]
    outputs: tuple[Output, ...]
    transform: Transform
    rows_per_group: int = 1
    from_codes: CodesTransform | None = None

    @property
    def rows(self) -> int:
        """Stacked rows; of a computed initializer, its own."""
        if not self.sources:
            return self.outputs[0].shape[self.outputs[0].row_axis]
        return sum(source.rows for source in self.sources)

    @property
    def row_bytes(self) -> int:
        """Of one row that the transform is given, or makes where it is given an index; float32."""
        shape = self.sources[0].shape[1:] if self.sources else self.outputs[0].shape[1:]
        return 4 * math.prod(shape)

    def converted(self, outputs: tuple[Output, ...], convert: Callable[[Arrays], Arrays]) -> Recipe:
        """The recipe of `outputs`, which `convert` makes of this recipe's arrays, wherever these come from."""
        inner, coded = self.transform, self.from_codes
        return replace(
            self,
            outputs=outputs,
            transform=lambda rows: convert(inner(rows)),
            from_codes=None if coded is None else lambda parts: convert(coded(parts)),
        )


@dataclass(slots=True)
class Traced:
    """A graph, and a recipe for each initializer that comes from the checkpoint or is computed.

    Attributes:
        recipes: by the name of each recipe's first output.
        encodings: how the checkpoint stores the tensors that aren't plain numbers, by name. Set before lowering (by
            `store_as`): lowerings choose by it.
        refused_codes: tensor -> why a lowering that takes codes doesn't take this one's.
        permutations, dtypes, input_scales: more of how the checkpoint stores tensors; see `Storage`.
        elsewhere: tensors of the checkpoint that another engine of the same bundle is made of.
    """

    model: ir.Model
    config: ModelConfig
    recipes: dict[str, Recipe] = field(default_factory=dict)
    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    refused_codes: dict[str, str] = field(default_factory=dict)
    permutations: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    dtypes: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    input_scales: Mapping[str, float] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()

    @property
    def compute_type(self) -> ir.DataType:
        """What the graph was traced in."""
        return ir.DataType[self.model.metadata_props.get("qwen_aot.compute_dtype", "float").upper()]

    @property
    def storage(self) -> Storage:
        """How the checkpoint stores its tensors."""
        return Storage(self.encodings, self.permutations, self.dtypes, self.input_scales)

    def store_as(self, storage: Storage) -> None:
        """Says, before lowering, how the checkpoint stores its tensors."""
        self.encodings, self.permutations, self.dtypes = storage.encodings, storage.permutations, storage.dtypes
        self.input_scales = storage.input_scales


class OutOfRangeError(ExportError):
    """A weight doesn't fit the type that it is to be stored in.

    Attributes:
        row: of the chunk that was converted.
        reason: what doesn't fit what, and the remedy; `str` of the error once the tensor is known.
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row
        self.reason = reason


def cast_to(dtype: ir.DataType) -> Transform:
    """A transform that only changes the dtype.

    Values that overflow it raise OutOfRangeError, naming the largest. Those too small for it become 0, as they do in
    every fp16 model: less than half of 6e-8 beside weights of about 0.02.
    """
    target = dtype.numpy()
    if dtype == ir.DataType.FLOAT:
        return lambda rows: (rows,)
    largest = float(ml_dtypes.finfo(target).max)  # type: ignore[no-untyped-call]  # its stub has no types

    def transform(rows: NDArray[np.float32]) -> tuple[NDArray[np.generic], ...]:
        magnitude = float(max(rows.max(initial=0.0), -rows.min(initial=0.0)))
        if magnitude > largest:
            row = int(np.argmax(np.abs(rows).reshape(len(rows), -1).max(axis=1)))
            raise OutOfRangeError(
                row,
                f"a weight of magnitude {magnitude:.6g} doesn't fit {dtype.name.lower()} (at most {largest:.6g}); "
                "use a wider compute type (fp32 holds every weight)",
            )
        return (rows.astype(target),)

    return transform


def output_bytes_of(traced: Traced, dtype: ir.DataType) -> int:
    """Bytes of the outputs of one type, padding left out."""
    outputs = (output for recipe in traced.recipes.values() for output in recipe.outputs)
    return sum(output.nbytes for output in outputs if output.dtype == dtype)
