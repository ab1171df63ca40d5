"""What tests of builds share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def answers_ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; a shell starts background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
