"""A lock whose holder may be asked, on its own thread, to do something once it leaves."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable

from qwen_aot.errors import GenerationError

__all__ = ["Exclusive", "hold_at_exit"]

EXIT_SECONDS = 60.0  # that the interpreter waits for a step at its end; the longest is one chunk of a prompt


class Exclusive:
    """One thread at a time, in a `with` block.

    A signal handler, or a finalizer that the garbage collector runs, comes on a thread that may hold the lock already:
    it can't wait for itself. What it wants done by `run` is done when the block is left; what enters again is refused.
    """

    def __init__(self) -> None:
        """Starts free."""
        # A handler may come between taking the lock and noting its holder; with a plain lock it would wait for itself.
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._afterwards: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        if self._holder == threading.get_ident():
            raise GenerationError("the engine is in a step on this very thread: end the step before you ask for more")
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *exc: object) -> None:
        try:
            while self._afterwards:
                self._afterwards.pop()()
        finally:
            self._holder = None
            self._lock.release()

    def run(self, action: Callable[[], None]) -> None:
        """Does something with the lock held: now, or when the block that this thread is in ends."""
        if self._holder == threading.get_ident():
            self._afterwards.append(action)
            return
        with self:
            action()


def hold_at_exit(lock: Exclusive) -> None:
    """Has the interpreter, as it ends, wait for the block that a daemon thread is in, and let no thread enter again.

    A thread that comes back into an interpreter which is going away is ended wherever it stands. In the C++ of an
    engine's bindings that aborts the process; waiting for a lock it is safe.

    Args:
        lock: of an engine's calls, and within which no other such lock is waited for.
    """
    _held_at_exit.add(lock)


_held_at_exit: weakref.WeakSet[Exclusive] = weakref.WeakSet()


@atexit.register
def _hold() -> None:
    for lock in list(_held_at_exit):
        lock._lock.acquire(timeout=EXIT_SECONDS)


# The threads that hold them aren't in a child; nobody there ends their blocks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held_at_exit.clear)
