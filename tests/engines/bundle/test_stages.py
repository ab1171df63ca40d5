"""Stages are announced in order and measured each on its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_aot.engines.bundle.progress import ProgressEvent
from qwen_aot.engines.bundle.stages import StageMeter, Stages


def test_a_stage_is_announced_advances_and_ends() -> None:
    events: list[ProgressEvent] = []
    stages = Stages(("one", "two"), events.append)
    assert stages.run("two", lambda advance: advance(3, 10) or 7) == 7
    assert [(e.stage, e.index, e.count, e.done, e.total) for e in events] == [
        ("two", 2, 2, 0, 0),
        ("two", 2, 2, 3, 10),
        ("two", 2, 2, 1, 1),
    ]


def test_peak_is_of_the_stage_alone() -> None:
    """In a process of its own: what tests before it left in this one's heap could serve the array."""
    code = """
import numpy as np
from qwen_aot.engines.bundle.stages import StageMeter
meter = StageMeter()
with meter.measure("large"):
    np.ones(100 << 20, np.uint8)
with meter.measure("small"):
    pass
large, small = meter.costs
assert large.peak_memory_bytes >= small.peak_memory_bytes + (50 << 20), meter.costs
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_failed_stage_is_not_recorded() -> None:
    meter = StageMeter()
    with pytest.raises(ValueError, match="no"), meter.measure("stage"):
        raise ValueError("no")
    assert meter.costs == []
