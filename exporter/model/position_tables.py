"""The tables that positions are looked up in: how many a context needs, and what stands in them.

A first-generation Qwen goes beyond the length that it was trained at by two formulas. Log-n scaling multiplies the
query at position p by max(1, log(p + 1) / log(length)). Dynamic NTK rotates all of a conversation by a base that the
number of tokens L of its first step decides: rope_theta · alpha^(D / (D − 2)) with
alpha = max(1, 2^ceil(log2(L / length) + 1) − 1). As alpha is 1, 3, 7, 15, … for L up to length, twice, four times,
eight times it, …, a context has few of them, and each has a rotary table of its own.

Source: `QWenModel.get_ntk_alpha`, `RotaryEmbedding` and `QWenAttention.logn_tensor` of the published modeling_qwen.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.limits import require_at_most
from qwen_aot.exporter.model.rope import inverse_frequencies

_ROWS = 4096  # computed at once, in float64
_MAX_STACKED_ROWS = 2**24  # recipes count rows in float32; 98,304 positions of three tables are the most published


@dataclass(frozen=True, slots=True)
class PositionTables:
    """The tables of one model and context.

    Attributes:
        positions: P, rows of each table; at least the cache's capacity.
        rotary_tables: how many there are, behind each other, P rows each. The first is of rows whose first step has up
            to `ModelConfig.dynamic_ntk_length` tokens, the next of up to twice as many, and so on.
        scales_queries: queries of some positions are multiplied by more than 1.
    """

    positions: int
    rotary_tables: int = 1
    scales_queries: bool = False

    @property
    def rotary_rows(self) -> int:
        """Of all rotary tables."""
        return self.positions * self.rotary_tables


def position_tables(config: ModelConfig, context: int, positions: int | None = None) -> PositionTables:
    """What a model needs for sequences of up to `context` tokens.

    Args:
        config: the model's facts.
        context: tokens.
        positions: P; None: the context.

    Raises:
        CheckpointError: so many rotary tables are more than any model has.
    """
    tables = PositionTables(
        positions=context if positions is None else positions,
        rotary_tables=1 + rotary_table(config, context),
        scales_queries=config.logn_attn_length is not None and config.logn_attn_length < context,
    )
    if tables.rotary_tables > 1:
        require_at_most("the number of rows of all rotary tables", tables.rotary_rows, _MAX_STACKED_ROWS)
    return tables


def rotary_table(config: ModelConfig, tokens: int) -> int:
    """The index of the rotary table of rows whose first step has so many tokens."""
    length = config.dynamic_ntk_length
    return 0 if length is None else (-(-tokens // length) - 1).bit_length()


def rotary_rows(
    config: ModelConfig, positions: int, rows: NDArray[np.integer], function: np.ufunc
) -> NDArray[np.float32]:
    """Cosine or sine of position x frequency in some rows of the stacked rotary tables.

    Args:
        config: the model's facts.
        positions: P, rows of one table.
        rows: [r] indices.
        function: numpy's cos or sin.

    Returns:
        [r, D/2]; angles are float32 as in transformers.
    """
    result = np.empty((len(rows), config.head_dim // 2), np.float32)
    table_of_row, position_of_row = np.divmod(rows, positions)
    for table in np.unique(table_of_row):
        frequencies, factor = inverse_frequencies(config.head_dim, _base(config, int(table)), config.rope_scaling)
        of_table = np.flatnonzero(table_of_row == table)
        for first in range(0, len(of_table), _ROWS):
            part = of_table[first : first + _ROWS]
            angles = position_of_row[part, None].astype(np.float32) * frequencies.astype(np.float32)
            result[part] = function(angles.astype(np.float64)) * factor
    return result


def query_scales(config: ModelConfig, positions: NDArray[np.integer]) -> NDArray[np.float32]:
    """What queries are multiplied by at some positions [r]: at least 1."""
    if config.logn_attn_length is None:
        return np.ones(len(positions), np.float32)
    scales: NDArray[np.float64] = np.log(positions.astype(np.float64) + 1) / np.log(config.logn_attn_length)
    return np.maximum(scales, 1.0).astype(np.float32)


def _base(config: ModelConfig, table: int) -> float:
    alpha = 2.0 ** (table + 1) - 1
    if alpha == 1.0:
        return config.rope_theta
    return float(config.rope_theta * alpha ** (config.head_dim / (config.head_dim - 2)))
