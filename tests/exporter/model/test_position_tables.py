"""Which rotary table each first step has, and what stands in the tables, by the formulas as they are published."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.position_tables import position_tables, query_scales, rotary_rows, rotary_table
from qwen_aot.exporter.model.variants import VARIANTS

QWEN_7B = VARIANTS["qwen-7b"]
LENGTH = 8192


def published_alpha(tokens: int, length: int) -> int:
    """`get_ntk_alpha` of modeling_qwen.py."""
    context = math.log(tokens / length, 2) + 1
    return max(2 ** math.ceil(context) - 1, 1)


@given(length=st.sampled_from([1, 2, 32, 2048, 8192, 1000]), tokens=st.integers(1, 70000))
def test_a_first_steps_table_is_that_of_its_alpha(length: int, tokens: int) -> None:
    config = dataclasses.replace(QWEN_7B, dynamic_ntk_length=length)
    assert 2 ** (rotary_table(config, tokens) + 1) - 1 == published_alpha(tokens, length)


@pytest.mark.parametrize("power", range(5))
def test_the_last_token_of_an_alpha(power: int) -> None:
    last = LENGTH * 2**power
    assert rotary_table(QWEN_7B, last) == power and rotary_table(QWEN_7B, last + 1) == power + 1


@pytest.mark.parametrize(
    ("context", "tables", "scales"),
    [(1, 1, False), (8192, 1, False), (8193, 2, True), (16384, 2, True), (16385, 3, True), (32768, 3, True)],
)
def test_a_context_has_the_tables_that_its_prompts_may_need(context: int, tables: int, scales: bool) -> None:
    found = position_tables(QWEN_7B, context, 33280)
    assert (found.positions, found.rotary_tables, found.scales_queries) == (33280, tables, scales)
    assert found.rotary_rows == 33280 * tables


@pytest.mark.parametrize("name", ["qwen-72b", "qwen1.5-7b"])
def test_other_models_have_one_table(name: str) -> None:
    found = position_tables(VARIANTS[name], 32768)
    assert (found.positions, found.rotary_tables, found.scales_queries) == (32768, 1, False)


def test_a_row_is_its_position_at_the_base_of_its_table() -> None:
    """Across a table's end, in one call. Angles are float32: at 33,000 radians 0.002 apart."""
    positions, D = 100, QWEN_7B.head_dim
    rows = np.arange(95, 205)
    found = rotary_rows(QWEN_7B, positions, rows, np.cos)
    for row, values in zip(rows, found, strict=True):
        table, position = divmod(int(row), positions)
        base = 10000.0 * (2 ** (table + 1) - 1) ** (D / (D - 2))
        wanted = [math.cos(position / base ** (2 * index / D)) for index in range(D // 2)]
        np.testing.assert_allclose(values, wanted, atol=2e-5)


def test_many_rows_are_the_same_in_any_cut() -> None:
    rows = np.arange(3 * 9000)
    whole = rotary_rows(QWEN_7B, 9000, rows, np.sin)
    cut = np.concatenate([rotary_rows(QWEN_7B, 9000, part, np.sin) for part in np.array_split(rows, 7)])
    np.testing.assert_array_equal(whole, cut)


def test_queries_scales() -> None:
    """`logn_list` of modeling_qwen.py, which ends at 32,766: the formula goes on."""
    published = [math.log(i, LENGTH) if i > LENGTH else 1 for i in range(1, 32768)]
    np.testing.assert_allclose(query_scales(QWEN_7B, np.arange(32767)), published, rtol=1e-7)
    assert query_scales(QWEN_7B, np.array([32767]))[0] == pytest.approx(math.log(32768) / math.log(8192))
    assert (query_scales(VARIANTS["qwen-72b"], np.arange(9)) == 1).all()


def test_more_tables_than_recipes_can_count_are_refused() -> None:
    config = dataclasses.replace(QWEN_7B, dynamic_ntk_length=1)
    with pytest.raises(CheckpointError, match="rows of all rotary tables is 22,020,096; accepted: up to 16,777,216"):
        position_tables(config, 2**20)
