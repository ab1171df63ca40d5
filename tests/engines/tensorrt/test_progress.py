"""Progress never falls, and whatever interrupts the watcher ends the work before it goes on."""

from __future__ import annotations

import _thread
import threading
import time

import pytest

from qwen_aot.engines.tensorrt.progress import make_monitor, run_watched
from tests.engines.tensorrt.builder_double import make_module


def test_the_long_phase_counts_and_never_falls() -> None:
    monitor = make_monitor(make_module())
    monitor.phase_start("Building engine", None, 6)
    assert monitor.step_complete("Building engine", 3)
    assert monitor.fraction == 0
    monitor.phase_start("Computing profile costs", "Building engine", 10)
    found = []
    for step in (0, 4, 2, 9):
        assert monitor.step_complete("Computing profile costs", step)
        found.append(monitor.fraction)
    assert found == [0.1, 0.5, 0.5, 1.0]


def test_a_cancelled_monitor_stops_at_the_next_step() -> None:
    monitor = make_monitor(make_module())
    monitor.is_cancelled = True
    assert monitor.step_complete("any", 0) is False


def test_the_result_and_the_error_of_the_work_come_back() -> None:
    assert run_watched(lambda: 7, lambda: None, lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        run_watched(lambda: 1 // 0, lambda: None, lambda: None)


def test_the_work_is_watched_meanwhile() -> None:
    watched = threading.Event()
    assert run_watched(lambda: watched.wait(10), lambda: None, watched.set)


@pytest.mark.usefixtures("answers_ctrl_c")
@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_cancels_and_outlasts_the_work(presses: int) -> None:
    watched, cancelled, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        assert watched.wait(10)
        for _ in range(presses):
            _thread.interrupt_main()
            time.sleep(0.3)
        assert cancelled.wait(10)
        time.sleep(0.2)  # TensorRT's step goes on for a while
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        run_watched(work, cancelled.set, watched.set)
    assert ended.is_set()


def test_what_the_watcher_raises_cancels_too() -> None:
    cancelled = threading.Event()

    def watch() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_watched(lambda: cancelled.wait(10), cancelled.set, watch)
    assert cancelled.is_set()
