"""Kernels run interpreted on the CPU, or on a GPU where TRITON_INTERPRET=0 was set (tests/plugins/test_gpu.py does)."""

import fcntl
import os
from pathlib import Path

import pytest
import torch

from plugins.library import FILE_NAME, build_library

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if IS_INTERPRETED:
    from tests.plugins import interpreter

    interpreter.install()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def plugin_build(pytestconfig: pytest.Config) -> Path:
    """A folder in which the library was built for SM 8.9, kept for the next session, which builds only what changed."""
    folder = Path(pytestconfig.cache.mkdir("plugin_library"))
    with open(folder / "lock", "w") as lock:  # pytest-xdist has several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_library(folder, ["8.9"])
    return folder


@pytest.fixture(scope="session")
def plugin_library(plugin_build: Path) -> Path:
    """The plugins' library, built for SM 8.9."""
    return plugin_build / FILE_NAME
