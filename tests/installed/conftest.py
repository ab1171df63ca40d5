"""The archives and the device's environment, made once for a whole session, whatever number of processes it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.installed.environments import Archives, build_archives, make_device
from tests.runtime.capi.conftest import onnxruntime, text_bundle
from tests.shared import once

__all__ = ["archives", "device", "onnxruntime", "text_bundle"]


@pytest.fixture(scope="session")
def archives(shared_folder: Path) -> Archives:
    """The sdist and the wheels of this checkout."""
    return once(shared_folder / "archives", build_archives)


@pytest.fixture(scope="session")
def device(shared_folder: Path, archives: Archives) -> Path:
    """The interpreter of a device: the wheel with the extra `cpu`, beside a neighbour's distribution."""
    return once(shared_folder / "device", lambda folder: make_device(folder / "venv", archives.wheel, "cpu"))
