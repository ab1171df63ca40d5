"""The library of own CPU kernels, of these very sources: compiled where it isn't yet, by one process of a session."""

from __future__ import annotations

import fcntl
import functools
from pathlib import Path

from qwen_aot.plugins.cpu.build import LIBRARY, build_if_changed


@functools.cache
def own_kernels() -> Path:
    """The library's path, in the checkout, where runtimes find it too."""
    LIBRARY.parent.mkdir(exist_ok=True)
    with (LIBRARY.parent / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_if_changed()
    return LIBRARY
