"""Real sockets: clients that are slow, that leave, that never read, and that don't speak HTTP."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from qwen_aot.runtime.server import http_protocol, slow_readers
from qwen_aot.runtime.server.guard import MAX_HEADER_BYTES
from qwen_aot.runtime.server.json_body import MAX_BODY_BYTES
from tests.runtime.server.servers import Running, events, letters, running

LONG = 1_000_000
pytestmark = pytest.mark.timeout(60, func_only=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_context=LONG) as made:
        yield made


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_idle(server: Running) -> bool:
    now = server.lifecycle.state.model.service.statistics()
    return (now.running, now.waiting, server.lifecycle.state.admitted) == (0, 0, 0) and now.submitted == now.ended


def request(body: dict[str, object], path: str = "/v1/completions") -> bytes:
    content = json.dumps({"model": "toy", "prompt": "Hi"} | body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(1 << 16):
        data += piece
    return data


def refusal(data: bytes) -> tuple[int, str]:
    """Status and code of a response in the API's form."""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_an_answer_over_a_socket(server: Running) -> None:
    body = {"model": "toy", "prompt": "Hi", "max_tokens": 7}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == letters(list(b"Hi"), 7)
    streamed = server.post("/v1/completions", body | {"stream": True})
    assert "".join(c["text"] for e in events(streamed.text) for c in e["choices"]) == letters(list(b"Hi"), 7)
    assert "server" not in streamed.headers


def clients_gone(server: Running) -> float:
    """How many requests are counted whose client had gone."""
    pattern = r'http_requests_total\{handler="/v1/completions",method="POST",status="499"\} (\S+)'
    found = re.search(pattern, httpx.get(server.url + "/metrics").text)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_is_cancelled(server: Running, is_streamed: bool) -> None:
    before = clients_gone(server)
    with server.connect() as connection:
        connection.sendall(request({"max_tokens": LONG - 10, "stream": is_streamed}))
        eventually(lambda: server.lifecycle.state.model.service.statistics().running == 1)
    eventually(lambda: is_idle(server))
    eventually(lambda: clients_gone(server) == before + 1)


def test_a_client_that_leaves_while_it_waits_or_sends(server: Running) -> None:
    engine = server.engine
    engine.gate.clear()
    connections = [server.connect() for _ in range(6)]
    for connection in connections[:5]:  # two more than there are rows
        connection.sendall(request({"max_tokens": LONG - 10}))
    connections[5].sendall(request({"max_tokens": 5})[:-10])
    eventually(lambda: server.lifecycle.state.admitted == 5)
    for connection in connections:
        connection.close()
    engine.gate.set()
    eventually(lambda: is_idle(server))


def test_a_reader_that_falls_behind_is_cancelled(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(request({"max_tokens": LONG - 10, "stream": True}))
        eventually(lambda: server.lifecycle.state.model.service.statistics().running == 1)
        eventually(lambda: is_idle(server))
        generated = server.engine.steps
        assert generated < 100_000  # far from the end
        assert b"[DONE]" not in read_all(connection)
    assert slow_readers.MAX_BACKLOG == 256


def test_a_slow_reader_that_keeps_up_is_not(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(
            request({"max_tokens": 1200, "stream": True}).replace(b"localhost", b"localhost\r\nConnection: close")
        )
        data = b""
        while piece := connection.recv(20_000):
            data += piece
            time.sleep(0.001)
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_headers_that_do_not_come(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at all, a beginning that goes on for ever, and a kept connection."""
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.2)
    with server.connect() as silent, server.connect() as dripping, server.connect() as kept:
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in kept.recv(1 << 16)
        kept.sendall(b"GET /health HTTP/1.1\r\n")
        started = time.monotonic()
        with pytest.raises(ConnectionError):
            for number in range(1000):
                dripping.sendall(b"GET / HTTP/1.1\r\nx: " if number == 0 else b"y")
                time.sleep(0.01)
        assert time.monotonic() - started < 5
        for connection in (silent, kept):
            with pytest.raises(ConnectionError):
                connection.recv(1)
                raise ConnectionError  # closed in order


def test_too_many_connections(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 0)
    with server.connect() as connection:
        assert read_all(connection) == b""
    monkeypatch.undo()
    assert httpx.get(server.url + "/health").status_code == 200


def test_a_body_that_nobody_reads_does_not_hold_a_connection(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.2)
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        assert b"200 OK" in connection.recv(1 << 16)
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"x")
                time.sleep(0.01)


def test_a_client_that_never_reads_its_answer(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed for it any more: its connection goes all the same."""
    monkeypatch.setattr(http_protocol, "WRITE_SECONDS", 0.2)
    with server.connect(receive_buffer=4096) as connection:
        connection.sendall(request({"max_tokens": 1500, "logprobs": 20}))
        eventually(lambda: server.lifecycle.state.model.service.statistics().running == 1)
        eventually(lambda: is_idle(server))
        time.sleep(1)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert len(body) < int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES + 1000, 2_000_000])
@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("where", ["header", "target"])
def test_headers_that_are_too_large(server: Running, size: int, is_whole: bool, where: str) -> None:
    with server.connect() as connection:
        filler = b"y" * size
        head = b"GET /health?" + filler if where == "target" else b"GET /health"
        head += b" HTTP/1.1\r\nHost: localhost\r\n" + (b"x: " + filler if where == "header" else b"")
        try:
            connection.sendall(head + (b"\r\n\r\n" if is_whole else b""))
            data = read_all(connection)
        except ConnectionError:  # it is closed while more comes
            return
    assert refusal(data) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_not_http(server: Running, data: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(data)
        assert refusal(read_all(connection)) == (400, "invalid_request")


def test_a_chunked_body_that_is_not_one(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        data = read_all(connection)
    assert data == b"" or refusal(data)[0] == 400
    eventually(lambda: is_idle(server))


@pytest.mark.parametrize("framing", [b"Content-Length: 9000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_is_too_large_gets_an_answer_before_its_end(server: Running, framing: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.connect() as connection:
        connection.sendall(head + framing + b"\r\n\r\n")
        piece = b" " * 500_000
        for _ in range(18):
            connection.sendall(piece if framing.startswith(b"C") else b"7a120\r\n" + piece + b"\r\n")
        if framing.startswith(b"T"):
            connection.sendall(b"0\r\n\r\n")
        data = read_all(connection)
    assert refusal(data) == (413, "body_too_large")
    assert 18 * len(piece) > 2 * MAX_BODY_BYTES


def test_a_client_that_asks_before_it_sends(server: Running) -> None:
    """`Expect: 100-continue`: a large body is refused before any of it is sent."""
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"Content-Length: 9000000\r\n\r\n")
        assert refusal(read_all(connection))[0] == 413
    with server.connect() as connection:
        connection.sendall(head + b"Content-Length: 15\r\nConnection: close\r\n\r\n")
        assert b"100 Continue" in connection.recv(1000)
        connection.sendall(b'{"prompt":"Hi"}')
        assert b'"tokens":[72,105]' in read_all(connection)


def test_pipelined_requests(server: Running) -> None:
    last = request({"max_tokens": 2}).replace(b"localhost", b"localhost\r\nConnection: close")
    with server.connect() as connection:
        connection.sendall(request({"max_tokens": 2}) * 3 + last)
        assert read_all(connection).count(b"200 OK") == 4


def test_health_answers_while_a_long_text_is_tokenized(server: Running) -> None:
    """The tokenizer, and what reads and writes much JSON, let the event loop run.

    `tokenizers.Tokenizer.encode` stops all of Python meanwhile: nearly all of the time would be one wait.
    """
    text = "hello world, " * 30_000
    body = json.dumps({"model": "toy", "messages": [{"role": "user", "content": text}]}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    waits = []
    with server.connect() as connection, httpx.Client(base_url=server.url) as client:
        client.get("/health")
        connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        connection.settimeout(0.001)
        data = b""
        while not data:
            started = time.monotonic()
            assert client.get("/health").status_code == 200
            waits.append(time.monotonic() - started)
            try:
                data = connection.recv(1 << 16)
            except TimeoutError:
                continue
    assert b"200 OK" in data
    assert max(waits) < 0.4 * sum(waits)


def test_texts_that_can_not_fit_are_not_tokenized() -> None:
    with running(max_context=100) as other:
        started = time.monotonic()
        for path, body in (
            ("/v1/completions", {"prompt": "x" * 4_000_000, "model": "toy"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 4_000_000}], "model": "toy"}),
            ("/tokenize", {"prompt": "x" * 4_000_000}),
        ):
            response = other.post(path, body)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert time.monotonic() - started < 5  # tokenizing one takes longer
