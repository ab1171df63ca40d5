"""Huge pages: content stays, and a system without /proc or with other maps is left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.runtime.backends.cpu.huge_pages import HUGE_PAGE, collapse_new_memory


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_memory_made_inside_keeps_its_content() -> None:
    kept = np.arange(HUGE_PAGE, dtype=np.int64)
    with collapse_new_memory():
        made = np.arange(4 * HUGE_PAGE, dtype=np.int64)
    np.testing.assert_array_equal(made[:: HUGE_PAGE // 8], np.arange(0, 4 * HUGE_PAGE, HUGE_PAGE // 8))
    assert kept[-1] == HUGE_PAGE - 1
    made[0] = 7  # still ours to write
    assert made[0] == 7


def test_a_system_without_proc_does_nothing(tmp_path: Path) -> None:
    with collapse_new_memory(tmp_path / "absent"):
        value = bytearray(HUGE_PAGE)
    assert value == bytearray(HUGE_PAGE)


def test_an_error_inside_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="inside"), collapse_new_memory():
        raise ValueError("inside")
