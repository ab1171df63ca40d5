"""The library of own CPU kernels, of these very sources: compiled where it isn't yet, by one process of a session."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_aot.plugins.cpu.build import FILE_NAME, build_if_changed, find_compiler, ingredients
from qwen_aot.runtime.backends.cpu.kernels import LIBRARY_VARIABLE

# In pytest's cache and not where runtimes look: what a test run compiles, of changed sources too, is nobody's library.
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "d" / "cpu_kernels"


@functools.cache
def own_kernels() -> Path:
    """The library's path. Runtimes find it where `named_kernels` or a test says so."""
    folder = _CACHE / hashlib.sha256(ingredients(find_compiler()).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_if_changed(folder / FILE_NAME)
    return folder / FILE_NAME


@contextlib.contextmanager
def named_kernels() -> Iterator[Path]:
    """Runtimes in this process, and those it starts, find the library meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIBRARY_VARIABLE, str(own_kernels()))
        yield own_kernels()
