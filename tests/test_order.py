"""Each worker begins with its share of the long tests, as pytest-xdist really hands them out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from tests.order import long_first

ROOT = Path(__file__).parents[1]


def stretches(tests: list[int], workers: int) -> list[list[int]]:
    """What `worksteal` gives each worker at first."""
    result = []
    for worker in range(workers):
        size = len(tests) // (workers - worker)
        result.append(tests[:size])
        tests = tests[size:]
    return result


@given(lengths=st.lists(st.booleans(), max_size=60), workers=st.integers(1, 4))
@example(lengths=[True] * 5 + [False] * 2, workers=4)  # stretches that hold nothing but long ones
def test_long_tests_begin_each_stretch_and_short_ones_keep_their_order(lengths: list[bool], workers: int) -> None:
    tests = list(range(len(lengths)))
    ordered = long_first(tests, workers, lengths.__getitem__)
    assert sorted(ordered) == tests
    short = [test for test in ordered if not lengths[test]]
    assert short == sorted(short)
    counts = [sum(lengths[test] for test in stretch) for stretch in stretches(ordered, workers)]
    assert max(counts) - min(counts) <= 1
    for stretch, count in zip(stretches(ordered, workers), counts, strict=True):
        assert all(lengths[test] for test in stretch[:count])


CONFTEST = """
import os
from tests.conftest import pytest_collection_modifyitems

def pytest_runtest_logstart(nodeid):
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        with open(worker, "a") as file:
            print(nodeid.partition("::test_")[2], file=file)
"""
MODULE = """
import time
import pytest

@pytest.mark.parametrize("number", range(6))
def test_short(number): pass

@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_long(number): time.sleep(0.5)

@pytest.mark.parametrize("number", range(6))
def test_left_out(number): pass
"""


def test_workers_begin_with_long_tests(tmp_path: Path) -> None:
    """With those that are asked for. As they were collected, the first worker would begin with `test_short`."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_of_this_test.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-k", "not left_out"]
    command += ["-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    begun = {worker: (tmp_path / worker).read_text().split() for worker in ("gw0", "gw1")}
    assert len({*begun["gw0"], *begun["gw1"]}) == 10
    # The stretches go to the workers in the order in which they were ready.
    assert sorted(tests[:2] for tests in begun.values()) == [["long[0]", "long[2]"], ["long[1]", "long[3]"]]
