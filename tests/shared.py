"""What is made once a session, whatever number of processes it has: pytest-xdist's workers share a folder.

The folder belongs to the session, so that nothing in it can be older than the code under test.
"""

from __future__ import annotations

import fcntl
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

Made = TypeVar("Made")


def session_folder(config: pytest.Config, factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of a session: pytest-xdist gives each of them a folder in the session's."""
    base = factory.getbasetemp()
    folder = (base.parent if hasattr(config, "workerinput") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, make: Callable[[Path], Made]) -> Made:
    """What `make` made in `folder`, by this process or by another one before; others wait meanwhile.

    Args:
        folder: where to make it; what a `make` that raised left there is deleted.
        make: called with the empty folder; what it gives is pickled, and each caller has a copy of its own.
    """
    result = folder / "made.pickle"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            content = pickle.dumps(make(folder))
            part = folder / "made.part"
            part.write_bytes(content)
            part.replace(result)
    made: Made = pickle.loads(result.read_bytes())
    return made
