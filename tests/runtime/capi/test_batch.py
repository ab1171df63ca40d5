"""The C library's batch where memory runs out, and where requests are cancelled at any time."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.capi.native import Native

WRAP = ["-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=free"]
STORMS = 20


def run(program: Path) -> list[dict[str, Any]]:
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_allocation_of_a_batch_may_fail(native: Native) -> None:
    # Each choice ends once, the rows are as the batch believes, and nothing is left: the program sees to that.
    for found in run(native.program("batch_memory", flags=WRAP)):
        assert found["runs"] > 200
        assert min(found["refused"], found["without_memory"], found["not_created"]) > 10  # each kind of end came


def check_threads(native: Native) -> None:
    found = run(native.program("batch_threads"))
    (prefill,) = [each for each in found if each["test"] == "a long prefill"]
    assert (prefill["ended"], prefill["others_tokens"], prefill["interrupts"]) == (1, 6, 1)
    assert prefill["milliseconds"] < 5000  # of ten seconds
    storms = [each for each in found if each["test"] == "storm"]
    assert len(storms) == STORMS
    for kind in ("cancelled", "whole", "harmed"):
        assert sum(each[kind] for each in storms) > 0, kind
    assert [each for each in found if each["test"] in ("a liar", "a handler")] == [
        {"test": "a liar", "ended": 1, "calls": 1},
        {"test": "a handler", "tokens": 4},
    ]


def test_any_thread_may_cancel(native: Native) -> None:
    check_threads(native)


@pytest.mark.deep
def test_any_thread_may_cancel_without_a_race(native_folder: Path) -> None:
    check_threads(Native(native_folder, "thread"))
