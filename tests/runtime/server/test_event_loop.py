"""Which event loop a server runs on."""

from __future__ import annotations

import asyncio
import sys

import pytest

from qwen_aot.runtime.server.event_loop import SWITCH_SECONDS, run


async def module_of_loop() -> str:
    return type(asyncio.get_running_loop()).__module__


@pytest.mark.skipif(sys.platform == "win32", reason="uvloop isn't there")
def test_it_is_the_fast_one() -> None:
    assert run(module_of_loop()).startswith("uvloop")


def test_it_is_pythons_where_the_other_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run(module_of_loop()).startswith("asyncio")


def test_threads_that_compute_let_it_go_on_soon() -> None:
    async def interval() -> float:
        return sys.getswitchinterval()

    before = sys.getswitchinterval()
    assert run(interval()) <= SWITCH_SECONDS < before
    assert sys.getswitchinterval() == before
