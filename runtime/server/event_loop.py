"""The event loop that a server runs on: uvloop's where it is installed, else Python's own."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

__all__ = ["run"]

T = TypeVar("T")

# How long a thread that parses or tokenizes keeps the event loop waiting, at each of a request's steps; Python's 0.005
# doubles what /health takes beside hostile bodies.
SWITCH_SECONDS = 0.001


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end on a new event loop, as `asyncio.run` does.

    An answer's token wakes the loop, which has slept since the last one: what the loop itself runs through then comes
    from memory, and not from a cache. uvloop's part of it is C. It isn't there on Windows.
    """
    with _quick_switches():
        try:
            import uvloop
        except ImportError:
            return asyncio.run(main)
        return uvloop.run(main)


@contextlib.contextmanager
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
