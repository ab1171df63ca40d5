"""The event loop that a server runs on: uvloop's where it is installed, else Python's own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["run"]

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end on a new event loop, as `asyncio.run` does.

    An answer's token wakes the loop, which has slept since the last one: what the loop itself runs through then comes
    from memory, and not from a cache. uvloop's part of it is C. It isn't there on Windows.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
