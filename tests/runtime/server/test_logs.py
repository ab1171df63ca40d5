"""What is logged, and what never is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from qwen_aot.runtime.server.logs import FORMATS, show_server_logs
from tests.runtime.server.servers import App

SECRET = "a-very-secret-sentence"


@pytest.fixture(autouse=True)
def loggers_are_put_back() -> Iterator[None]:
    names = ("qwen_aot", "uvicorn", "asyncio")
    before = [(logging.getLogger(name), vars(logging.getLogger(name)).copy()) for name in names]
    yield
    for logger, state in before:
        logger.handlers, logger.propagate = state["handlers"], state["propagate"]
        logger.setLevel(state["level"])


@pytest.mark.parametrize("form", FORMATS)
def test_a_line_for_each_request_and_no_prompt_in_it(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_server_logs(form)
    key = "the-key-0123456789"
    headers = {"authorization": f"Bearer {key}"}
    with App(keys=(key,)) as app:
        app.complete({"prompt": SECRET, "user": SECRET}, headers=headers)
        app.chat({"messages": [{"role": "user", "content": SECRET}], "stop": [SECRET]}, headers=headers)
        app.complete({"prompt": SECRET, "x": 1}, headers=headers)
        app.complete({"prompt": "\x01" + SECRET}, headers=headers)
        app.complete({"prompt": SECRET})
        app.ask("GET", f"/nothing?{SECRET}", headers=headers)
        app.ask("GET", "/health")
        app.ask("GET", "/metrics", headers=headers)
    out, err = capsys.readouterr()
    assert out == "" and SECRET not in err and key not in err
    lines = [line for line in err.splitlines() if "request" in line and "failed" not in line]
    assert len(lines) == 6
    if form == "json":
        entries = [json.loads(line) for line in lines]
        assert [entry["status"] for entry in entries] == [200, 200, 400, 500, 401, 404]
        assert entries[0]["tokens"] == 5 and entries[0]["path"] == "/v1/completions"
        assert all(entry["time"].endswith("Z") and entry["level"] == "info" for entry in entries)
    else:
        assert "method=POST path=/v1/completions status=200" in lines[0]


def test_control_characters_of_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    show_server_logs("text")
    with App() as app:
        app.ask("GET", "/a%0d%0ab%1b[31m" + "x" * 1000)
    (line,) = capsys.readouterr().err.splitlines()
    assert "/a\\r\\nb\\x1b[31mxxx" in line and len(line) < 500


def test_a_fault_has_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show_server_logs("json")
    with App() as app:
        monkeypatch.setattr("qwen_aot.runtime.server.completions.check_choices", lambda *_: 1 / 0)
        app.complete({})
    entries = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert "ZeroDivisionError" in entries[0]["traceback"] and entries[0]["request"] == entries[1]["request"]
    assert entries[1]["status"] == 500
