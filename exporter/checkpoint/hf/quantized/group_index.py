"""Act-order: a tensor that says in which group each column is, as an order of columns in which groups are whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.hf.quantized.linear import INT32, INT64, StoredLinear


def permutation_of(
    linear: StoredLinear, suffix: str, group_size: int, *, may_permute: bool | None
) -> NDArray[np.int64] | None:
    """Columns sorted by group, those of a group in their order; None: every column k is in group k // group_size.

    Args:
        linear: the weight.
        suffix: of the tensor [K] with each column's group.
        group_size: columns of a group; divides K.
        may_permute: what the configuration says of act-order; None: nothing.

    Raises:
        CheckpointError: the tensor is missing where it is needed, there where it isn't, of another shape, or holds
            groups that don't exist or aren't filled with group_size columns.
    """
    k = linear.shape[1]
    if suffix not in linear.parts and not may_permute:
        return None
    linear.check(suffix, (k,), INT32, INT64)
    index = linear.array(suffix)
    groups = k // group_size
    if np.array_equal(index, np.arange(k) // group_size):
        return None
    if index.min() < 0 or index.max() >= groups:
        column = int(np.argmax((index < 0) | (index >= groups)))
        raise linear.error(suffix, f"puts column {column} in group {index[column]}; accepted: 0 to {groups - 1}")
    filled = np.bincount(index, minlength=groups)
    if (filled != group_size).any():
        group = int(np.argmax(filled != group_size))
        raise linear.error(suffix, f"puts {filled[group]} columns in group {group}; accepted: {group_size} in each")
    if may_permute is False:
        raise linear.error(
            suffix,
            "puts columns in other groups than their place, and the configuration denies act-order: libraries then "
            "read the weight in different ways; accepted: the place's group, or desc_act: true",
        )
    return np.argsort(index, kind="stable")
