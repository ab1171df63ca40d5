"""The lock of steps, where a signal handler comes on the thread that takes or holds it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import pytest

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.engine.exclusive import Exclusive


class _Interrupted:
    """A lock that is interrupted by a signal handler just after it was taken."""

    def __init__(self, lock: threading.Lock, handler: Callable[[], None]) -> None:
        self._lock = lock
        self._handler: Callable[[], None] | None = handler

    def acquire(self) -> None:
        self._lock.acquire()
        handler, self._handler = self._handler, None
        if handler is not None:
            handler()

    def release(self) -> None:
        self._lock.release()


def test_what_a_handler_wants_within_the_block_is_done_after_it() -> None:
    exclusive, done = Exclusive(), []
    with exclusive:
        exclusive.run(lambda: done.append("closed"))
        with pytest.raises(GenerationError, match="on this very thread"), exclusive:
            pass
        assert not done
    assert done == ["closed"]
    with exclusive:  # and the lock is free
        pass


def test_a_handler_that_comes_while_the_lock_is_taken_waits_for_nobody() -> None:
    exclusive, done = Exclusive(), []
    exclusive._lock = _Interrupted(exclusive._lock, lambda: exclusive.run(lambda: done.append("closed")))  # type: ignore[assignment]

    def step() -> None:
        with exclusive:
            done.append("stepped")

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    thread.join(10)
    assert done == ["closed", "stepped"]


def test_another_thread_waits() -> None:
    exclusive, done = Exclusive(), []
    with exclusive:
        thread = threading.Thread(target=exclusive.run, args=(lambda: done.append("closed"),))
        thread.start()
        thread.join(0.05)
        assert not done
    thread.join(10)
    assert done == ["closed"]


END = textwrap.dedent(
    """
    import os, sys, threading, time
    from qwen_aot.runtime.engine.exclusive import Exclusive, hold_at_exit

    lock, inside = Exclusive(), threading.Event()
    hold_at_exit(lock)

    def steps():
        while True:
            with lock:
                inside.set()
                os.write(1, b"(")
                time.sleep(0.2)
                os.write(1, b")")

    threading.Thread(target=steps, daemon=True).start()
    inside.wait()
    if sys.argv[1] == "fork":
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        else:
            sys.exit()  # at once: the lock is another process's thread's
    """
)


@pytest.mark.parametrize("case", ["end", "fork"])
def test_the_interpreter_ends_between_two_blocks(case: str) -> None:
    done = subprocess.run([sys.executable, "-c", END, case], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.replace("()", "") == ""
    assert done.stdout
