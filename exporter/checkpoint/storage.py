"""How a checkpoint stores its tensors, as far as a graph is made by it; small facts, no weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import Checkpoint, encodings_of
from qwen_aot.exporter.checkpoint.encoding import CodeForm, Encoding


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """What is known of the tensors before any is read; equal to itself alone, so that it can be a key.

    Attributes:
        encodings: of the tensors that aren't plain numbers, by name.
        permutations: of the encoded tensors whose columns are in another order: [K], see `EncodedRows.permutation`.
        dtypes: of the tensors of plain numbers.
        input_scales: of the encoded tensors whose inputs are rounded too: `EncodedRows.input_scale`.
    """

    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    permutations: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    dtypes: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    input_scales: Mapping[str, float] = field(default_factory=dict)

    def form(self, name: str) -> CodeForm | None:
        """Of a tensor's codes; None: it has none."""
        encoding = self.encodings.get(name)
        return None if encoding is None else encoding.form

    def permutation(self, name: str) -> NDArray[np.int64] | None:
        """A tensor's order of columns; None: its own."""
        return self.permutations.get(name)

    @property
    def fixed(self) -> Iterator[tuple[str, Encoding]]:
        """The tensors that fix the precision of a build."""
        return ((name, encoding) for name, encoding in self.encodings.items() if encoding.fixes_precision)


def storage_of(checkpoint: Checkpoint) -> Storage:
    """Reads orders of columns and inputs' scales, with one row of each tensor that has one, and no other weights.

    Raises:
        CheckpointError: a row can't be read, or an order isn't one.
    """
    encodings = encodings_of(checkpoint)
    tensors = checkpoint.tensors.values()
    return Storage(
        encodings,
        dict(_permutations(checkpoint, encodings)),
        {info.name: info.dtype for info in tensors if info.encoding is None},
        dict(_input_scales(checkpoint, encodings)),
    )


def _input_scales(checkpoint: Checkpoint, encodings: Mapping[str, Encoding]) -> Iterable[tuple[str, float]]:
    for name, encoding in encodings.items():
        if encoding.form is not None and encoding.form.has_input_scale:
            scale = checkpoint.read_encoded(name, slice(0, 1)).input_scale
            assert scale is not None, name
            yield name, scale


def _permutations(checkpoint: Checkpoint, encodings: Mapping[str, Encoding]) -> Iterable[tuple[str, NDArray[np.int64]]]:
    for name, encoding in encodings.items():
        if encoding.form is not None and encoding.form.has_permutation:
            permutation = checkpoint.read_encoded(name, slice(0, 1)).permutation
            width = checkpoint.tensors[name].shape[1]
            if permutation is None or not np.array_equal(np.sort(permutation), np.arange(width)):
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {name}: the order of its columns isn't one of its {width} columns, "
                    "each of them once; the checkpoint is damaged"
                )
            yield name, permutation
