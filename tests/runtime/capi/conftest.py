"""The C library, compiled once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.capi.native import Native


@pytest.fixture(scope="session")
def native_folder(pytestconfig: pytest.Config) -> Path:
    """Where the flavours of the library are built."""
    return Path(pytestconfig.cache.mkdir("capi"))


@pytest.fixture(scope="session")
def native(native_folder: Path) -> Native:
    """The library's inside, without sanitizers."""
    return Native(native_folder)
