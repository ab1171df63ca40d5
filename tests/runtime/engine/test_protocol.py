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
