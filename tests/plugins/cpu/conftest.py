"""The kernels for the CPU, compiled for these tests."""

from pathlib import Path

import pytest

from qwen_aot.plugins.cpu.build import FILE_NAME, build_library
from tests.shared import once


@pytest.fixture(scope="session")
def library(shared_folder: Path) -> Path:
    """The library, compiled from these sources."""
    return once(shared_folder / "cpu_library", lambda folder: build_library(folder / FILE_NAME))
