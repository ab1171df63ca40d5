"""SlowReaders: ends streams whose reader has fallen far behind, so that nothing is computed for nobody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from qwen_aot.runtime.generation.handle import RequestHandle
from qwen_aot.runtime.server.feed import Feed

__all__ = ["SlowReaders", "Stream"]

MAX_BACKLOG = 256  # events
LOOK_SECONDS = 0.02

log = logging.getLogger("qwen_aot.server")


class Stream:
    """One stream, as it is looked after.

    Attributes:
        is_cut: its reader was too slow.
    """

    def __init__(self, feed: Feed, handles: Sequence[RequestHandle], abort: Callable[[], None]) -> None:
        """Starts with nothing sent; `abort` ends its connection."""
        self.is_cut = False
        self._feed = feed
        self._handles = handles
        self._abort = abort
        self._sends = 0  # begun
        self._is_sending = False
        self._seen = -1  # the send that was under way when it was looked at last

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """While something is being sent."""
        self._sends += 1
        self._is_sending = True
        try:
            yield
        finally:
            self._is_sending = False

    def look(self) -> None:
        """Cuts it if one and the same send has waited since the last look, and too much has come since.

        An event loop that was busy itself finds many events at once, and sends them.
        """
        is_stuck = self._is_sending and self._seen == self._sends
        self._seen = self._sends
        if is_stuck and not self.is_cut and self._feed.backlog > MAX_BACKLOG:
            self.is_cut = True
            log.warning("a reader fell %d events behind: its request is cancelled", self._feed.backlog)
            for handle in self._handles:
                handle.cancel()
            self._abort()


class SlowReaders:
    """Looks at all streams of an event loop from time to time, while there are some."""

    def __init__(self) -> None:
        self._streams: set[Stream] = set()
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watch(self, stream: Stream) -> Iterator[None]:
        """Looks after a stream meanwhile."""
        self._streams.add(stream)
        self._arm()
        try:
            yield
        finally:
            self._streams.discard(stream)
            if not self._streams and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        for stream in list(self._streams):
            stream.look()
        if self._streams:
            self._arm()
