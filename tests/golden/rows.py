"""Rows of logits that two languages make alike, from a number: what the vectors of generation hold in place of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = 2**64 - 1


def row_of(description: Sequence[float] | Mapping[str, Any]) -> NDArray[np.float32]:
    """Logits [V] as written, or as {"size": V, "seed": number, "peaks": [[id, logit], ...]} describes them.

    A 64-bit state begins as the seed; for each id it becomes state * 6364136223846793005 + 1442695040888963407 modulo
    2^64 (Knuth's MMIX), and the logit is (state >> 40) / 2^20 - 8, which float32 holds exactly. Then peaks are set.
    """
    if not isinstance(description, Mapping):
        return np.array(description, np.float32)
    state, values = description["seed"], []
    for _ in range(description["size"]):
        state = (state * 6364136223846793005 + 1442695040888963407) & _MASK
        values.append((state >> 40) / 2**20 - 8)
    row = np.array(values, np.float32)
    for token_id, logit in description.get("peaks", ()):
        row[token_id] = logit
    return row
