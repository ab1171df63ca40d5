"""A pytest plugin: CPU seconds of each test, of this process and of the children it waited for.

    python -m pytest -p tests.cpu_times --cpu-times FILE ...

appends lines as `--durations=0` prints them, which scripts/test_times.py reads. On a machine that others use too, wall
time says little. Caches count for the test that fills them.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest


def cpu_seconds() -> float:
    """Of this process and of those that it started and that ended, user and system."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", type=Path, metavar="FILE", help="append each test's CPU seconds")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = cpu_seconds()
    yield
    path: Path | None = item.config.getoption("--cpu-times")
    if path is not None:
        with path.open("a") as file:  # a short line is appended whole, whatever number of processes does so
            file.write(f"{cpu_seconds() - before:.2f}s call     {item.nodeid}\n")
