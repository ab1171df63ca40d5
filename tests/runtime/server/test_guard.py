"""Who is answered: keys, the name that a server is asked by, pages of other sites, and sizes of headers."""

from __future__ import annotations

import pytest

from qwen_aot.runtime.server import guard
from qwen_aot.runtime.server.outermost import PATHS
from tests.runtime.server.servers import App

KEY = "the-key-0123456789"
OTHER = "another-key-0123456789"


@pytest.mark.parametrize(
    "path",
    [
        *PATHS,
        "/v1/models/toy",
        "/page/chat.css",
        "/page/chat.js",
        "/page/",
        "/page/chat.py",
        "/nothing",
        "/v1/responses",
    ],
)
@pytest.mark.parametrize("has_page", [True, False])
def test_the_key_guards_every_path_but_health_and_the_page(path: str, has_page: bool) -> None:
    method = "POST" if "completions" in path or "tokenize" in path else "GET"
    with App(keys=(KEY, OTHER), has_page=has_page) as app:
        for wrong in ({}, {"authorization": "Bearer " + KEY[:-1]}, {"authorization": f"Basic {KEY}"}):
            response = app.ask(method, path, headers=wrong)
            if path == "/health" or (has_page and path in ("/", "/page/chat.css", "/page/chat.js")):
                assert response.status_code == 200
                continue
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text
        for key in (KEY, OTHER):
            assert app.ask(method, path, headers={"authorization": f"Bearer {key}"}).status_code != 401


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", f"bearer {KEY}x", f"Bearer {KEY} {KEY}", KEY, "Bearer \xff"]
)
def test_other_headers_than_a_key(given: str) -> None:
    with App(keys=(KEY,)) as app:
        response = app.ask("GET", "/version", headers={"authorization": given.encode("latin-1")})
        assert response.status_code == 401
        assert app.ask("GET", "/version", headers={"authorization": f"bearer  {KEY}"}).status_code == 200


def test_a_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key, whichever fits, by the function that is made for it, and digests of one length."""
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    with App(keys=(KEY, OTHER)) as app:
        for given in (KEY, OTHER, "x", "x" * 5000):
            compared.clear()
            app.ask("GET", "/version", headers={"authorization": f"Bearer {given}"})
            assert compared == [(32, 32), (32, 32)]


def test_nothing_is_read_of_a_request_without_a_key() -> None:
    async def never() -> object:
        raise AssertionError("the body was read")
        yield b""

    with App(keys=(KEY,)) as app:
        assert app.ask("POST", "/v1/completions", content=never()).status_code == 401


@pytest.mark.parametrize(
    ("host", "is_answered"),
    [
        ("127.0.0.1:8000", True),
        ("127.0.0.1", True),
        ("localhost:1", True),
        ("LOCALHOST", True),
        ("[::1]:8000", True),
        ("192.168.1.5:8000", True),
        ("llm.example.com", True),
        ("LLM.example.com:8000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("llm.example.com.evil.example", False),
        ("", False),
        ("[evil.example]", False),
        ("a:b:c", False),
    ],
)
def test_the_name_by_which_a_server_is_asked(host: str, is_answered: bool) -> None:
    """A page that has made its own name mean 127.0.0.1 asks by that name."""
    with App(allowed_hosts=("llm.example.com",)) as app:
        response = app.ask("GET", "/health", headers={"host": host})
        assert response.status_code == (200 if is_answered else 421)
    with App(allowed_hosts=("*",)) as app:
        assert app.ask("GET", "/health", headers={"host": host}).status_code == 200


def test_pages_of_other_sites() -> None:
    with App() as app:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:9999", "http://localhost", "x", ""):
            response = app.complete({}, headers={"origin": origin})
            assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed"), origin
            assert not any(name.startswith("access-control") for name in response.headers)
        own = app.complete({}, headers={"origin": "http://127.0.0.1:8000"})
        assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


def test_a_site_that_is_listed() -> None:
    site = "https://chat.example.com"
    preflight = {
        "origin": site,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with App(cors_origins=(site,), keys=(KEY,)) as app:
        asked = app.ask("OPTIONS", "/v1/completions", headers=preflight)  # a browser sends no key with it
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == site
        answer = app.complete({}, headers={"origin": site, "authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == site
        assert app.complete({}, headers={"origin": site}).status_code == 401
        other = app.ask("OPTIONS", "/v1/completions", headers={**preflight, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        wrong = app.complete({}, headers={"origin": "https://evil.example", "authorization": f"Bearer {KEY}"})
        assert wrong.status_code == 403


def test_headers_that_are_too_large() -> None:
    with App() as app:
        most = guard.MAX_HEADER_BYTES
        for headers in ({"x": "y" * most}, {f"x{number}": "y" * (most // 100) for number in range(100)}):
            response = app.ask("GET", "/health", headers=headers)
            assert (response.status_code, response.headers["connection"]) == (431, "close")
        assert app.ask("GET", "/health", headers={"x": "y" * (most - 1000)}).status_code == 200
