"""Compiling with a progress bar and a Ctrl-C: TensorRT works in a thread of its own, the caller watches.

An exception can't pass through TensorRT's C++, so nothing is raised in its callbacks: cancelling sets a flag that the
next callback returns. Between two callbacks TensorRT-RTX 1.7 compiles a whole profile (8 s of a 0.5B model).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# The phase that takes nearly all the time, in both libraries; its steps are spread evenly over the profiles.
_LONG_PHASE = "Computing profile costs"
_POLL_SECONDS = 0.1


class Monitor(Protocol):
    """A progress monitor that can be asked and told."""

    is_cancelled: bool

    @property
    def fraction(self) -> float:
        """How much of the compilation is done, 0 to 1; never falls."""


def make_monitor(trt: Any) -> Any:
    """An `IProgressMonitor` that is also `Monitor`. TensorRT calls it from any of its threads."""

    class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.is_cancelled = False
            self._lock = threading.Lock()
            self._steps: dict[str, int] = {}
            self._fraction = 0.0

        @property
        def fraction(self) -> float:
            return self._fraction

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._steps[phase_name] = max(1, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if phase_name == _LONG_PHASE:
                    self._fraction = max(self._fraction, min(1.0, (step + 1) / self._steps.get(phase_name, 1)))
            return not self.is_cancelled

    return ProgressMonitor()


def run_watched(work: Callable[[], Result], cancel: Callable[[], None], watch: Callable[[], None]) -> Result:
    """Runs `work` in a thread and calls `watch` meanwhile, several times a second.

    Whatever is raised here while it runs (Ctrl-C, SIGTERM, what `watch` raises) cancels it; once it has ended, that
    exception goes on.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="compile") as pool:
        future: Future[Result] | None = None
        try:
            future = pool.submit(work)
            while not wait([future], _POLL_SECONDS).done:
                watch()
            return future.result()
        except BaseException:
            cancel()  # before anything else can be interrupted
            if future is not None and not future.done():
                logger.warning("stopping; TensorRT ends the step that it is in first")
                _outlast(future)
            raise


def _outlast(future: Future[Any]) -> None:
    """Waits for the end, whatever the user presses: the thread uses files that are cleaned up afterwards."""
    while not future.done():
        try:
            wait([future])
        except KeyboardInterrupt:
            logger.warning("still stopping")
