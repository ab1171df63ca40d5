"""Which logits have to be finite: those that mean something."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError, check_finite

NAN = float("nan")


def test_of_rows_of_one_token() -> None:
    check_finite(np.array([[1.0, 2.0]], np.float32), 0)
    check_finite(np.array([[NAN, 2.0], [1.0, 2.0]], np.float32), 0, np.array([0, 1]))  # the first is idle
    with pytest.raises(NonFiniteLogitsError) as caught:
        check_finite(np.array([[1.0, 2.0], [1.0, np.inf]], np.float32), 3, np.array([1, 1]))
    assert caught.value.rows == (4,)


def test_of_rows_of_several_tokens_the_last_ones() -> None:
    logits = np.zeros((3, 3, 2), np.float32)
    logits[0, 0, 0] = logits[1, :2, 1] = logits[2] = NAN
    check_finite(logits, 0, np.array([2, 1, 0]))
    for counts, rows in (((3, 1, 0), (0,)), ((2, 2, 0), (1,)), ((2, 1, 1), (2,)), ((3, 3, 3), (0, 1, 2))):
        with pytest.raises(NonFiniteLogitsError) as caught:
            check_finite(logits, 0, np.array(counts))
        assert caught.value.rows == rows


@pytest.mark.parametrize("wrong", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 4099])
def test_whatever_stands_around_it(wrong: float, size: int) -> None:
    """At each end and in between, among numbers and the largest ones that are still finite."""
    largest = np.finfo(np.float32).max
    for row in (np.linspace(-9, 9, size, dtype=np.float32), np.full(size, largest), np.full(size, -largest)):
        check_finite(row[None], 0)
        for place in {0, size // 2, size - 1}:
            spoiled = row.copy()
            spoiled[place] = wrong
            with pytest.raises(NonFiniteLogitsError):
                check_finite(spoiled[None], 0)
