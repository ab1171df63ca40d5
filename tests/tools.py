"""What a test needs and a machine may lack: it is skipped by name, and fails where everything must be there.

`.ci/deep` installs every tool and sets QWEN_AOT_DEEP=1, so that a test can't be skipped there for the want of one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from collections.abc import Iterator
from types import ModuleType
from typing import NoReturn

import pytest

DEEP = "QWEN_AOT_DEEP"
SECOND_PART = ("deep", "tools", "fuzz", "network")  # markers of what `.ci/deep` runs

_running: list[pytest.Item] = []  # the test that runs in this process, and one within it


@contextlib.contextmanager
def running(item: pytest.Item) -> Iterator[None]:
    """While a test runs with its fixtures (tests/conftest.py): its markers are looked at when it asks for a tool."""
    _running.append(item)
    try:
        yield
    finally:
        _running.pop()


def _refuse_unless_run_in_both_parts() -> None:
    """A test that the first part of CI may skip and the second doesn't run would be run by nobody.

    A module that asks while it is imported needs no marker: the second part imports every module.
    """
    if _running and not any(_running[-1].get_closest_marker(name) for name in SECOND_PART):
        pytest.fail(
            f"{_running[-1].nodeid} asks for what a machine may lack, and .ci/deep doesn't run it; mark it with one of "
            + ", ".join(SECOND_PART),
            pytrace=False,
        )


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
    _refuse_unless_run_in_both_parts()
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
    _refuse_unless_run_in_both_parts()
    for name in names:
        found = shutil.which(name) or (shutil.which(name, path=path) if path else None)
        if found is not None:
            return found
    lacking(f"{' or '.join(names)} isn't installed: {remedy}")


def require_package(module: str, remedy: str) -> ModuleType:
    """A module that may not be installed; one that is there and fails to import is an error."""
    _refuse_unless_run_in_both_parts()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
    lacking(f"{module} isn't installed: {remedy}")
