"""Who is looked after, and who is cut. Over a socket: `test_http_protocol.py`."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from qwen_aot.runtime.server import slow_readers
from qwen_aot.runtime.server.feed import Feed
from qwen_aot.runtime.server.slow_readers import SlowReaders, Stream


class Backlog:
    """The one thing of a feed that is asked."""

    def __init__(self, backlog: int) -> None:
        self.backlog = backlog


@pytest.mark.parametrize("backlog", [slow_readers.MAX_BACKLOG, slow_readers.MAX_BACKLOG + 1])
def test_a_sending_that_waits_is_cut_once_too_much_has_come(backlog: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_readers, "LOOK_SECONDS", 0.001)
    aborts: list[int] = []

    async def wait() -> bool:
        stream = Stream(cast(Feed, Backlog(backlog)), [], lambda: aborts.append(1))
        with SlowReaders().watch(stream):
            await asyncio.sleep(0.1)
        return stream.is_cut

    assert asyncio.run(wait()) == (backlog > slow_readers.MAX_BACKLOG)
    assert len(aborts) == (backlog > slow_readers.MAX_BACKLOG)


def test_sendings_that_get_on_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many events there are: an event loop that was busy finds them all at once."""
    monkeypatch.setattr(slow_readers, "LOOK_SECONDS", 0.005)

    async def send() -> bool:
        readers, stream = SlowReaders(), Stream(cast(Feed, Backlog(10_000)), [], lambda: None)
        for _ in range(100):
            with readers.watch(stream):
                await asyncio.sleep(0)
            await asyncio.sleep(0.0002)
        return stream.is_cut

    assert not asyncio.run(send())


def test_nobody_is_looked_after_where_nothing_waits() -> None:
    async def watch() -> None:
        readers, stream = SlowReaders(), Stream(cast(Feed, Backlog(0)), [], lambda: None)
        assert readers._timer is None
        with readers.watch(stream):
            assert readers._timer is not None
        assert readers._timer is None

    asyncio.run(watch())
