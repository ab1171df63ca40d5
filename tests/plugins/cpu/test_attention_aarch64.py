"""Attention for aarch64, compiled here and run by qemu, against NumPy in float64; .ci/deep runs these."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.plugins.cpu.build import SOURCES
from tests.plugins.cpu.attention import Result, Step, check, random_step
from tests.shared import once
from tests.tools import require_tool

pytestmark = [pytest.mark.deep, pytest.mark.tools]

SYSROOT = "/usr/aarch64-linux-gnu"  # Debian's libc6-dev-arm64-cross
PATHS = ("portable", "neon")
ATTENTION = Path(__file__).parent / "src" / "attention_cases.cpp"


@pytest.fixture(scope="module")
def compiler() -> str:
    return require_tool("aarch64-linux-gnu-g++", remedy="apt install g++-aarch64-linux-gnu")


@pytest.fixture(scope="module")
def emulator() -> list[str]:
    return [require_tool("qemu-aarch64", remedy="apt install qemu-user"), "-cpu", "max", "-L", SYSROOT]


@pytest.fixture(scope="module")
def attention(compiler: str, shared_folder: Path) -> Path:
    def make(folder: Path) -> Path:
        names = ("attention", "attention_neon", "attention_portable", "instructions")
        sources = [SOURCES / f"{name}.cpp" for name in names]
        command = [compiler, "-std=c++17", "-O2", f"-I{SOURCES}", ATTENTION, *sources, "-o", folder / "cases"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return folder / "cases"

    return once(shared_folder / "cpu_attention_aarch64", make)


def run_attention(command: list[str | Path], step: Step, instructions: str) -> Result:
    """What the program computes of a step whose positions are its own."""
    B, S, _ = step.query.shape
    Hkv, C, D = step.past_key.shape[1:]
    of_number = step.past_key.dtype.itemsize
    asked = np.array([B, S, step.num_heads, Hkv, D, C, len(step.cos), of_number], np.int64).tobytes()
    asked += np.array(step.scale, np.float64).tobytes()
    arrays = (step.query, step.key, step.value, step.past_key, step.past_value, step.cos, step.sin)
    asked += b"".join(array.tobytes() for array in (*arrays, step.held.astype(np.int64), step.fresh.astype(np.int64)))
    asked += b"".join(scale.tobytes() for _, scale in step.scales)
    environment = {**os.environ, "QWEN_AOT_CPU_INSTRUCTIONS": instructions}
    done = subprocess.run(
        list(map(str, command)), input=asked, capture_output=True, env=environment, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    size, cached = step.query.nbytes, step.past_key.nbytes
    assert len(done.stdout) == size + 2 * cached
    caches = np.frombuffer(done.stdout[size:], step.past_key.dtype).reshape(2, *step.past_key.shape)
    return Result(np.frombuffer(done.stdout[:size], np.float32).reshape(step.query.shape), *caches)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8])
@pytest.mark.parametrize("instructions", PATHS)
def test_attention(attention: Path, emulator: list[str], instructions: str, dtype: type) -> None:
    steps = [
        random_step(1, [0, 5, 70], [9, 1, 0], dtype=dtype),
        random_step(2, [0], [37], H=7, Hkv=1, D=128, dtype=dtype),
        random_step(3, [300, 2], [1, 1], H=6, Hkv=3, D=48, dtype=dtype, spare=5),
    ]
    for step in steps:
        result = run_attention([*emulator, attention], step, instructions)
        check(step, result)
    with pytest.raises(AssertionError, match="attention: "):  # the control
        check(step, Result(result.attention + np.float32(1e-3), result.present_key, result.present_value))


def test_instructions_that_there_are_not(attention: Path, emulator: list[str]) -> None:
    """It is the other processor's: this one's sets have no name there."""
    with pytest.raises(AssertionError, match="this CPU has: portable, neon, neon_dot"):
        run_attention([*emulator, attention], random_step(1, [0], [1]), "avx2")
