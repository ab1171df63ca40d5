"""Texts fed side by side give the logits that each gives alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.engines.verify.forced_logits import forced_logits
from tests.engines.verify.rows_engine import RowsEngine, after, table

VOCAB = 7
TABLE = table(0, VOCAB)

texts = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids)))
    ),
    min_size=1,
    max_size=7,
)


@given(texts=texts, rows=st.integers(1, 4))
def test_each_position_once_with_its_own_logits(texts: list[tuple[list[int], int]], rows: int) -> None:
    engine = RowsEngine(TABLE, rows)
    engine.held[0] = [3, 3]  # what somebody left
    sequences = [np.array(ids, np.int64) for ids, _ in texts]
    prompts, lengths = [prompt for _, prompt in texts], [len(ids) + 1 for ids, _ in texts]
    found = {}
    for text, position, logits in forced_logits(engine, rows, sequences, prompts, lengths):
        assert (text, position) not in found
        found[text, position] = logits.copy()
    assert sorted(found) == [
        (text, at) for text, (ids, prompt) in enumerate(texts) for at in range(prompt - 1, len(ids))
    ]
    for (text, position), logits in found.items():
        np.testing.assert_array_equal(logits, after(TABLE, texts[text][0][: position + 1]))
    assert not any(engine.held)
    assert sorted(engine.prompts) == sorted(lengths)


@pytest.mark.parametrize(("rows", "steps"), [(1, 14), (2, 8), (3, 6), (4, 6)])
def test_all_rows_are_used(rows: int, steps: int) -> None:
    """Rests of 6, 5, 2 and 1 tokens: two rows take 6 + 2 steps, with the longest beside each other."""
    engine = RowsEngine(TABLE, rows)
    sequences = [np.zeros(length, np.int64) for length in (2, 7, 3, 6)]
    list(forced_logits(engine, rows, sequences, [1] * 4, [7] * 4))
    if rows == 3:  # 6, 5 and 2 together, then the last one
        steps += 1
    assert len(engine.steps) == steps
    assert sum(engine.steps) == 14


def test_memory_of_the_engine_is_valid_until_the_next_only() -> None:
    """Negative control of the double: kept views would be compared with what came later."""
    engine = RowsEngine(TABLE, 1)
    kept = [logits for *_, logits in forced_logits(engine, 1, [np.array([1, 2, 3])], [1], [3])]
    assert not np.array_equal(kept[0], after(TABLE, [1]))
