"""The archives and the device's environment, made once for a whole session, whatever number of processes it has."""

from __future__ import annotations

import fcntl
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.installed.environments import Archives, build_archives, make_device

Made = TypeVar("Made")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """One folder for all processes of a session: pytest-xdist gives each of them a folder in the session's."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "installed"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def archives(shared_folder: Path) -> Archives:
    """The sdist and the wheels of this checkout."""
    return _once(shared_folder / "archives", build_archives)


@pytest.fixture(scope="session")
def device(shared_folder: Path, archives: Archives) -> Path:
    """The interpreter of a device: the wheel with the extra `cpu`, beside a neighbour's distribution."""
    return _once(shared_folder / "device", lambda folder: make_device(folder / "venv", archives.wheel, "cpu"))


def _once(folder: Path, make: Callable[[Path], Made]) -> Made:
    """What `make` made in `folder`, by this process or by another one before."""
    result = folder / "made.pickle"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            folder.mkdir()
            result.write_bytes(pickle.dumps(make(folder)))
        made: Made = pickle.loads(result.read_bytes())
    return made
