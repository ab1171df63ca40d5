"""Every test here needs a GPU; without one it is skipped, and says so."""

from __future__ import annotations

import pytest

from qwen_aot.runtime.cli.doctor import gpus


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if not gpus():
        pytest.skip("no NVIDIA GPU or driver (neither nvidia-smi nor CUDA finds one)")
