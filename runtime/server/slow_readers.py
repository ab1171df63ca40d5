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

    def look(self) -> None:
        """Cuts it if too much has come while it waits for its reader."""
        if not self.is_cut and self._feed.backlog > MAX_BACKLOG:
            self.is_cut = True
            log.warning("a reader fell %d events behind: its request is cancelled", self._feed.backlog)
            for handle in self._handles:
                handle.cancel()
            self._abort()


class SlowReaders:
    """Looks from time to time at the streams of an event loop that wait for their readers, while there are some.

    Where all readers keep up, it costs nothing.
    """

    def __init__(self) -> None:
        self._waiting: dict[Stream, bool] = {}  # whether it was looked at since it waits
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watch(self, stream: Stream) -> Iterator[None]:
        """Looks after a stream while something is sent on it."""
        self._waiting[stream] = False
        self._arm()
        try:
            yield
        finally:
            del self._waiting[stream]
            if not self._waiting and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        """Lets those be cut that one and the same sending has kept since the last look.

        An event loop that was busy itself finds many events at once, and sends them.
        """
        self._timer = None
        for stream, has_waited in list(self._waiting.items()):
            if has_waited:
                stream.look()
            else:
                self._waiting[stream] = True
        self._arm()
