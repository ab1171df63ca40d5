"""Kernels and library on a GPU: all cases against their references, under compute-sanitizer, and timed.

Each runs in a process of its own, since this one interprets kernels. One command: `pytest -m gpu tests/plugins`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_aot.plugins.library import build_library, cuda_headers, tensorrt_headers
from qwen_aot.plugins.variants import SMS, TACTICS
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.enqueue import compile_driver
from tests.plugins.sanitizer_cases import CASES, ENVIRONMENT, run

ROOT = Path(__file__).parents[2]
SANITIZER = "compute-sanitizer"
FOUND_ERRORS = 86  # the exit code that the sanitizer is asked for
# Of the bandwidth, by a long kernel that is bound by memory: what a sound one reaches, and what no right count exceeds.
LEAST_SHARE, MOST_SHARE = 0.4, 1.05


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a child process that compiles kernels, with the tiles of this GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: a GPU, its driver and a CUDA build of torch are needed")
    sm = ".".join(map(str, torch.cuda.get_device_capability()))
    if sm not in SMS:
        pytest.skip(f"there are no kernels for SM {sm}; there are for {', '.join(SMS)}")
    return {**os.environ, "TRITON_INTERPRET": "0", "QWEN_AOT_TEST_SM": sm, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def library_cases(environment, tmp_path_factory) -> list[str]:
    """The arguments of a Python that runs `tests.plugins.device`, with the library built for this GPU."""
    folder = tmp_path_factory.mktemp("library")  # gpu-check has no cache of pytest's
    library = build_library(folder, [environment["QWEN_AOT_TEST_SM"]])
    _, harness = compile_driver(folder, [tensorrt_headers(folder / "build"), cuda_headers()])
    return ["-m", "tests.plugins.device", str(harness), str(library)]


def child(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_gqa.py", "test_moe.py"])
def test_kernels_equal_their_references_on_the_gpu(name, environment):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"tests/plugins/{name}"]
    done = child(command, environment)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.gpu
def test_the_library_equals_the_references_on_the_gpu(library_cases, environment):
    done = child([sys.executable, *library_cases], environment)
    assert done.returncode == 0 and f"{len(CASES)} cases ran" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("code", ["kernels", "library"])
def test_compute_sanitizer_finds_nothing(code, tool, environment, request):
    path = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if path is None:
        pytest.skip(f"{SANITIZER} isn't installed; it comes with the CUDA toolkit")
    options = ["--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--target-processes", "all"]
    cases = ["-m", "tests.plugins.sanitizer_cases"] if code == "kernels" else request.getfixturevalue("library_cases")
    command = [path, *options, sys.executable, *cases]
    done = child(command, {**environment, **ENVIRONMENT})
    assert done.returncode != FOUND_ERRORS, f"{tool} found errors:\n{done.stdout[-6000:]}"
    assert done.returncode == 0 and f"{len(CASES)} cases ran" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.slow
def test_benchmark_reaches_a_sound_share_of_the_bandwidth(environment, tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.bench.plugin_kernels", "--model", "qwen1.5-0.5b", "--json", str(results)]
    done = child(command, environment)
    if "name it with --device" in done.stderr:
        pytest.skip("a Jetson doesn't tell its bandwidth: run the benchmark by hand, with --device")
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(results.read_text())["rows"]
    long = [row for row in rows if row["reason"] == "memory" and row["predicted_seconds"] > 50e-6]
    assert long
    assert all(LEAST_SHARE <= row["share"] <= MOST_SHARE for row in long), done.stdout
    tactics = {case: {row["tactic"] for row in rows if row["case"] == case} for case in {row["case"] for row in rows}}
    assert tactics and all(found == set(TACTICS) for found in tactics.values()), tactics


@pytest.mark.skipif(not IS_INTERPRETED, reason="kernels are interpreted without a GPU")
def test_sanitizer_cases_are_right_in_the_interpreter():
    """So that what the sanitizer runs is known to be sound, and its list doesn't rot."""
    run(torch.device("cpu"))
