"""The interpreter of PTX, loaded into this process."""

from pathlib import Path

import pytest

from tests.plugins.ptx.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter(ptx_interpreter: Path) -> Interpreter:
    return Interpreter(ptx_interpreter)
