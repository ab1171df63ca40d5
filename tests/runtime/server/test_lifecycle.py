"""A server's life in one process: it listens, loads, drains, and says how it went."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from qwen_aot.errors import BundleError
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.server.event_loop import run
from qwen_aot.runtime.server.lifecycle import Lifecycle, bind, url_of
from qwen_aot.runtime.server.settings import ServerSettings, SettingsError
from tests.runtime.generation.schedules import check_rows
from tests.runtime.server.servers import Running, events, letters, make_generator, running
from tests.runtime.server.test_http_protocol import eventually, is_idle, request

pytestmark = pytest.mark.timeout(90, func_only=True)


def test_requests_at_work_finish_and_new_ones_are_refused() -> None:
    with running(grace_seconds=30.0) as server:
        server.engine.gate.clear()
        with ThreadPoolExecutor() as pool:
            body = {"model": "toy", "prompt": "Hi", "max_tokens": 20}
            whole = pool.submit(server.post, "/v1/completions", body)
            streamed = pool.submit(server.post, "/v1/completions", body | {"stream": True})
            eventually(lambda: server.lifecycle.state.admitted == 2)
            server.lifecycle.stop()
            assert httpx.get(server.url + "/ready").status_code == 503
            assert httpx.get(server.url + "/health").json()["phase"] == "draining"
            assert server.post("/v1/completions", body).json()["error"]["code"] == "stopping"
            server.engine.gate.set()
            assert whole.result(30).json()["choices"][0]["text"] == letters(list(b"Hi"), 20)
            assert len(events(streamed.result(30).text)) == 21
        assert server.exit_codes.get(timeout=30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")
        assert server.engine.is_closed


@pytest.mark.parametrize("is_second_signal", [True, False])
def test_requests_that_take_too_long_are_cut_and_told_so(is_second_signal: bool) -> None:
    with running(max_context=1_000_000, grace_seconds=60.0 if is_second_signal else 0.3) as server:
        with ThreadPoolExecutor() as pool:
            body = {"model": "toy", "prompt": "Hi", "max_tokens": 900_000}
            whole = pool.submit(server.post, "/v1/completions", body)
            streamed = pool.submit(server.post, "/v1/completions", body | {"stream": True})
            eventually(lambda: server.lifecycle.state.admitted == 2)
            server.lifecycle.stop()
            if is_second_signal:
                time.sleep(0.2)
                assert not whole.done()
                server.lifecycle.stop(2)
            assert whole.result(30).status_code == 503
            assert events(streamed.result(30).text)[-1]["error"]["code"] == "stopping"
        assert server.exit_codes.get(timeout=30) == 128 + (2 if is_second_signal else 15)


def test_connections_that_do_nothing_do_not_hold_it_up() -> None:
    with running() as server, server.connect() as idle, server.connect() as half, server.connect() as stuck:
        half.sendall(request({})[:-10])
        stuck.sendall(b"GET /hea")
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in idle.recv(1 << 16)
        started = time.monotonic()
        server.lifecycle.stop()
        assert server.exit_codes.get(timeout=30) == 0
        assert time.monotonic() - started < 10


def test_an_engine_that_fails_as_a_whole_ends_the_server() -> None:
    with running() as server:
        server.engine.failure = MemoryError("gone")
        assert server.post("/v1/completions", {"model": "toy", "prompt": "Hi"}).status_code == 503
        assert server.exit_codes.get(timeout=30) == 1


def test_while_it_loads() -> None:
    """/health answers, nothing else does; and it can be stopped."""
    gate, generator = threading.Event(), make_generator()[0]

    def load() -> Generator:
        assert gate.wait(30)
        return generator

    settings = ServerSettings(port=0)
    with bind(settings) as listener:
        lifecycle = Lifecycle(settings, listener, load, lambda model: None)
        with ThreadPoolExecutor() as pool:
            running_ = pool.submit(lambda: run(lifecycle.run()))
            url = url_of(listener, settings)

            def is_listening() -> bool:
                try:
                    return httpx.get(url + "/health").json()["phase"] == "loading"
                except httpx.ConnectError:
                    return False

            eventually(is_listening)
            assert httpx.get(url + "/ready").json()["error"]["code"] == "loading"
            lifecycle.stop()
            assert running_.result(30) == 0
        gate.set()


def test_a_bundle_that_can_not_be_opened() -> None:
    def load() -> Generator:
        raise BundleError("it is damaged")

    settings = ServerSettings(port=0)
    with bind(settings) as listener:
        lifecycle = Lifecycle(settings, listener, load, lambda model: None)
        with pytest.raises(BundleError, match="it is damaged"):
            run(lifecycle.run())


def test_addresses() -> None:
    with bind(ServerSettings(port=0)) as taken:
        port = taken.getsockname()[1]
        taken.listen()
        assert port > 0 and url_of(taken, ServerSettings(port=0)) == f"http://127.0.0.1:{port}"
        with pytest.raises(SettingsError, match=rf"can't listen at 127.0.0.1 port {port} .* choose another --port"):
            bind(ServerSettings(port=port))
    with pytest.raises(SettingsError, match=r"see --host"):
        bind(ServerSettings(host="192.0.2.1", port=0, without_keys=True))  # kept for documents: nobody has it
    with bind(ServerSettings(host="localhost", port=0)) as named:
        assert named.getsockname()[0] in ("127.0.0.1", "::1")
    if socket.has_ipv6:
        with bind(ServerSettings(host="::1", port=0)) as listener:
            assert url_of(listener, ServerSettings(host="::1", port=0)).startswith("http://[::1]:")


def one_request(server: Running, seed: int) -> None:
    """A request, and what a client does meanwhile."""
    rng = random.Random(seed)
    body: dict[str, object] = {
        "prompt": rng.choice(["Hi", "\x01", "x" * rng.randrange(1, 200), [1], ["a", "b"], [5000]]),
        "max_tokens": rng.choice([1, 3, 20, 150]),
        "stream": rng.random() < 0.5,
        "n": rng.choice([1, 1, 1, 2, 3, 4]),
    }
    if rng.random() < 0.1:
        body["nonsense"] = True
    if rng.random() < 0.2:
        schema = rng.choice([{"type": "integer"}, {"enum": ["a" * 30, "b"]}, {"type": "string", "pattern": "("}])
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    data = request(body)
    with server.connect() as connection:
        action = rng.random()
        if action < 0.1:
            connection.sendall(data[: rng.randrange(len(data))])
        elif action < 0.3:
            connection.sendall(data)
            connection.recv(rng.choice([1, 100, 1000]))
        elif action < 0.4:
            connection.sendall(data)
        elif action < 0.5:
            connection.sendall(data[:-1] + b"!")
            connection.recv(1 << 16)
        else:
            connection.sendall(data.replace(b"localhost", b"localhost\r\nConnection: close"))
            received = b""
            while piece := connection.recv(1 << 16):
                received += piece
            assert received.startswith(b"HTTP/1.1 ") and int(received.split()[1]) in (200, 400, 429, 500), received


@pytest.mark.parametrize(
    "count", [300, pytest.param(2000, marks=pytest.mark.deep), pytest.param(10_000, marks=pytest.mark.deep)]
)
def test_nothing_leaks_whatever_clients_do(count: int) -> None:
    """Threads, descriptors, handles, rows: all are back, and every request has ended once."""
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with running(rows=3, max_queue=16) as server:
        with ThreadPoolExecutor(16) as pool:
            for done in [pool.submit(one_request, server, seed) for seed in range(count)]:
                done.result(60)
        eventually(lambda: is_idle(server))
        state = server.lifecycle.state
        assert not state._handles and state.admitted == state._submitting == state._compiling._pending == 0
        now = state.model.service.statistics()
        assert now.submitted == now.ended > count / 3
        # Rows are free; what they still hold is what the scheduler knows of, for prompts that begin so.
        batch = state.model.generator.driver.batch
        assert batch.is_idle and batch.rows_in_use == 0
        check_rows(batch, server.engine)
        assert server.post("/v1/completions", {"model": "toy", "prompt": "Hi", "max_tokens": 3}).status_code == 200
    assert server.exit_codes.get(timeout=30) == 0
    eventually(lambda: threading.active_count() == threads)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
