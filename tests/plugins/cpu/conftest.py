"""The kernels for the CPU, compiled for these tests."""

from pathlib import Path

import pytest

from tests.cpu_kernels import own_kernels


@pytest.fixture(scope="session")
def library() -> Path:
    """The library, compiled from these sources."""
    return own_kernels()
