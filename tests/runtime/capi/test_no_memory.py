"""Each allocation of the library fails once: a status comes back, nothing leaks, and then it works."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.runtime.capi.native import Native

WRAP = ["-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc"]
FEWEST = {"open": 40, "generate": 60}  # allocations: that the program reaches the library's own


def run(native: Native, what: str, bundle: Path, onnxruntime: Path, cpu_kernels: Path | None = None) -> None:
    environment = {
        **os.environ,
        "QWEN_AOT_ONNXRUNTIME": str(onnxruntime),
        **({} if cpu_kernels is None else {"QWEN_AOT_CPU_KERNELS": str(cpu_kernels)}),
        "LSAN_OPTIONS": "suppressions=" + str(Path(__file__).with_name("leaks.txt")),
    }
    program = native.program("no_memory", flags=WRAP)
    done = subprocess.run([program, what, bundle], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted = re.match(r"(\d+) allocations", done.stdout)
    assert counted and int(counted[1]) >= FEWEST[what]


@pytest.mark.parametrize("what", ["open", "generate"])
def test_every_allocation_may_fail(native: Native, text_bundle: Path, onnxruntime: Path, what: str) -> None:
    run(native, what, text_bundle, onnxruntime)


def test_every_allocation_may_fail_with_own_kernels(
    native: Native, text_bundle: Path, onnxruntime: Path, cpu_kernels: Path
) -> None:
    run(native, "open", text_bundle, onnxruntime, cpu_kernels)


@pytest.mark.deep
@pytest.mark.parametrize("what", ["open", "generate"])
@pytest.mark.parametrize("is_own", [False, True], ids=["onnxruntime", "own"])
def test_nothing_leaks(
    native_folder: Path, text_bundle: Path, onnxruntime: Path, cpu_kernels: Path, what: str, is_own: bool
) -> None:
    kernels = cpu_kernels if is_own else None
    run(Native(native_folder, "address"), what, text_bundle, onnxruntime, kernels)
