"""A server's life: it listens, loads the bundle, serves, and stops in order when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.server.app import make_app
from qwen_aot.runtime.server.guard import MAX_HEADER_BYTES
from qwen_aot.runtime.server.http_protocol import HttpProtocol
from qwen_aot.runtime.server.settings import ServerSettings, SettingsError
from qwen_aot.runtime.server.state import Model, ServerState

__all__ = ["Lifecycle", "bind", "url_of"]

LOOK_SECONDS = 0.1  # between looks at what may have changed
ENGINE_LOOK_SECONDS = 1.0  # the same, at whether the engine has failed; each look costs an answer at work its caches
CLOSE_SECONDS = 5.0  # for streams to say that they were cut, and for the step at work to end
FLUSH_SECONDS = 1  # for connections to end behind that: one may be in the middle of a body
SEND_BUFFER_BYTES = 64 << 10  # of the system, for each connection: what is in it, no reader has read
BACKLOG = 128
KEEP_ALIVE_SECONDS = 15

_REMEDIES = {
    errno.EADDRINUSE: "another program uses it: choose another --port",
    errno.EACCES: "ports below 1024 are the system's: choose another --port",
}

log = logging.getLogger("qwen_aot.server")


def bind(settings: ServerSettings) -> socket.socket:
    """A socket at the address of the settings, before anything is loaded.

    Raises:
        SettingsError: it is taken, isn't this machine's, or may not be used.
    """
    where = f"{settings.host} port {settings.port}"
    try:
        infos = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"{where} is no address ({error.strerror}); see --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
    except OSError as error:
        listener.close()
        remedy = _REMEDIES.get(error.errno or 0, "see --host")
        raise SettingsError(f"can't listen at {where} ({error.strerror}); {remedy}") from error
    return listener


def url_of(listener: socket.socket, settings: ServerSettings) -> str:
    """Where clients find it, with the port that the system chose for 0."""
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'http' if settings.certificate is None else 'https'}://{host}:{port}"


class _Uvicorn(uvicorn.Server):
    """Uvicorn without its handling of signals, which are the lifecycle's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class Lifecycle:
    """One server. `run` is its life; `stop` may come from a signal."""

    def __init__(
        self,
        settings: ServerSettings,
        listener: socket.socket,
        load: Callable[[], Generator],
        on_ready: Callable[[Model], None],
    ) -> None:
        """Loads nothing yet.

        Args:
            settings: as given.
            listener: from `bind`.
            load: opens the bundle; runs in a thread.
            on_ready: told when requests are taken.
        """
        self.state = ServerState(settings)
        self._settings = settings
        self._listener = listener
        self._load = load
        self._on_ready = on_ready
        self._stops = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # while it runs
        self._stopping = asyncio.Event()
        self._last_signal: int = signal.SIGTERM
        self._is_cut = False

    def stop(self, number: int = signal.SIGTERM) -> None:
        """The first time: finish what is at work, for the time that the settings give. Again: at once."""
        self._stops += 1
        self._last_signal = number
        self.state.drain()
        if (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(self._stopping.set)

    async def run(self) -> int:
        """Serves until it is stopped.

        Returns:
            The exit code: 0 if everything at work was finished, 128 + the signal if some was cut, 1 if the engine has
            failed.

        Raises:
            Exception: what loading raised.
        """
        self._loop = asyncio.get_running_loop()
        server = _Uvicorn(self._config())
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        try:
            with self._signals():
                await self._until_started(server, serving)
                if not self._stops:
                    await self._load_and_serve()
                await self._drain()
        finally:
            self._loop = None
            server.should_exit = True
            await asyncio.wait([serving])
            failed = await self._close()
        serving.result()
        if failed:
            return 1
        return 128 + self._last_signal if self._is_cut else 0

    def _config(self) -> uvicorn.Config:
        settings = self._settings
        options: dict[str, Any] = {}
        if settings.certificate is not None:
            options = {"ssl_certfile": settings.certificate, "ssl_keyfile": settings.certificate_key}
        return uvicorn.Config(
            make_app(self.state),
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            **options,
        )

    async def _until_started(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        while not server.started and not serving.done():
            await asyncio.sleep(LOOK_SECONDS / 10)
        if serving.done():
            serving.result()

    async def _load_and_serve(self) -> None:
        """Until it is stopped or the engine has failed."""
        loading = _InThread(self._load)
        while not loading.is_done.is_set():
            await asyncio.sleep(LOOK_SECONDS)
            if self._stops:  # the thread ends with the process
                return
        model = self.state.start(loading.result())
        self._on_ready(model)
        while not self._stops:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), ENGINE_LOOK_SECONDS)
            if not model.service.statistics().is_accepting:
                log.error("the engine has failed: the server stops")
                self.state.drain()
                return

    async def _drain(self) -> None:
        """Lets requests finish, until the time is over or a second signal comes; then cuts them."""
        self.state.drain()
        end = asyncio.get_running_loop().time() + self._settings.grace_seconds
        if self.state.admitted:
            log.info("stopping: %d answers are at work", self.state.admitted)
        while self.state.admitted and self._stops < 2 and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(LOOK_SECONDS)
        self._is_cut = self.state.cut()
        end = asyncio.get_running_loop().time() + CLOSE_SECONDS
        while self.state.admitted and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(LOOK_SECONDS)
        self._is_cut |= self.state.admitted > 0  # answers that nobody reads

    async def _close(self) -> bool:
        """Closes service and engine, if the step at work ends in time; whether the engine had failed."""
        self.state.close()
        model = self.state.loaded
        if model is None:
            return False
        failed = not model.service.statistics().is_accepting
        if await asyncio.to_thread(model.service.close, CLOSE_SECONDS):
            model.generator.close()
        return failed

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """While it is entered, SIGINT and SIGTERM stop the server; only in the main thread, and not what is ignored."""
        before: list[tuple[int, Any]] = []
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (int(signal.SIGINT), int(signal.SIGTERM)):
                handler = signal.getsignal(number)
                if handler is not signal.SIG_IGN:
                    before.append((number, handler))
                    loop.add_signal_handler(number, self.stop, number)
        try:
            yield
        finally:
            for number, handler in before:
                loop.remove_signal_handler(number)
                signal.signal(number, handler)


class _InThread:
    """A function's run in a thread that doesn't keep the process from ending."""

    def __init__(self, function: Callable[[], Generator]) -> None:
        self.is_done = threading.Event()
        self._function = function
        self._value: Generator | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="qwen-aot-load", daemon=True).start()

    def result(self) -> Generator:
        """What it returned; what it raised is raised."""
        if self._error is not None:
            raise self._error
        assert self._value is not None
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error
        self.is_done.set()
