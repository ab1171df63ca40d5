"""What a test needs and a machine may lack: it is skipped by name, and fails where everything must be there.

`.ci/deep` installs every tool and sets QWEN_AOT_DEEP=1, so that a test can't be skipped there for the want of one.
"""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest

DEEP = "QWEN_AOT_DEEP"


def is_deep() -> bool:
    """Whether this is the second part of CI, which has every tool.

    Raises:
        pytest.UsageError: the variable holds neither 1 nor nothing.
    """
    value = os.environ.get(DEEP, "")
    if value not in ("", "1"):
        raise pytest.UsageError(f"{DEEP} is {value!r}; accepted: 1, or unset")
    return value == "1"


def lacking(reason: str) -> NoReturn:
    """Ends the test (or the module, while it is collected): skipped with its reason, or failed where all is there."""
    if is_deep():
        pytest.fail(f"{reason}; {DEEP}=1 says that everything is installed", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require_tool(*names: str, remedy: str, path: str | None = None) -> str:
    """The path of the first of some programs that is there.

    Args:
        names: programs that serve alike.
        remedy: how to install one, such as "apt install clang".
        path: folders beside those of PATH, as PATH has them.
    """
    for name in names:
        found = shutil.which(name) or (shutil.which(name, path=path) if path else None)
        if found is not None:
            return found
    lacking(f"{' or '.join(names)} isn't installed: {remedy}")


def require_package(module: str, remedy: str) -> ModuleType:
    """A module that may not be installed; one that is there and fails to import is an error."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
    lacking(f"{module} isn't installed: {remedy}")
