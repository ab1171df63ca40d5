"""The server's own description: all of its paths, what their bodies may hold to the last bound, and what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from qwen_aot.runtime.server.chat import CHAT_BODY
from qwen_aot.runtime.server.completions import COMPLETION_BODY
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.fields import Reader, boolean, integer, object_of, refused, text
from qwen_aot.runtime.server.openapi import describe
from qwen_aot.runtime.server.outermost import PATHS
from qwen_aot.runtime.server.settings import ServerSettings
from qwen_aot.runtime.server.token_endpoints import DETOKENIZE_BODY, TOKENIZE_BODY
from qwen_aot.version import __version__
from tests.runtime.server.json_schemas import fits
from tests.runtime.server.servers import App

APART = json.loads((Path(__file__).parent / "clients" / "openapi.json").read_text(encoding="utf-8"))
SERVED = describe(ServerSettings())
KEY = "the-key-0123456789"
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES = {
    "/v1/chat/completions": (CHAT_BODY, {"model": "toy", "messages": MESSAGES}),
    "/v1/completions": (COMPLETION_BODY, {"model": "toy", "prompt": "Hi"}),
    "/tokenize": (TOKENIZE_BODY, {"prompt": "Hi"}),
    "/detokenize": (DETOKENIZE_BODY, {"tokens": [65]}),
}


def body_schema(document: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return found


def test_it_is_served_behind_the_key() -> None:
    with App(keys=(KEY,), is_loaded=False) as app:
        assert app.ask("GET", "/openapi.json").status_code == 401
        response = app.ask("GET", "/openapi.json", headers={"authorization": f"Bearer {KEY}"})
        assert response.status_code == 200
        document = response.json()
    assert document["info"]["version"] == __version__ and document["security"] == [{"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert "security" not in SERVED
    with App() as app:  # nothing of it is lost on the way
        assert app.ask("GET", "/openapi.json").json() == json.loads(json.dumps(SERVED))


def test_every_path_of_the_server_is_described() -> None:
    with App(has_page=False) as app:
        inner: Any = app.asgi
        while not hasattr(inner, "routes"):
            inner = inner._app
        routes = {
            (route.path.replace(":path", ""), method.lower())
            for route in inner.routes
            if isinstance(route, Route)
            for method in route.methods or ("GET",)
            if method != "HEAD"
        }
    described = {(path, method) for path, methods in SERVED["paths"].items() for method in methods}
    assert described == routes
    # Metrics know the same paths, and the page.
    assert {path for path, _ in described} == (set(PATHS) - {"/"}) | {"/v1/models/{model}"}


CALLED = {"name": "f", "arguments": "{}"}
# Values at which some kind of field changes its mind.
PROBES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 20, 21, 128, 129, 1000, 1001, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), -2,
    0.0, 0.5, -0.5, 1.0, 1.5, 2.0, 2.1, -2.1, 0.001, 0.0005, 1e-9, 1000.5, "", "a", "auto", "none", "required",
    "default",
    "x" * 1000, "x" * 1001, [], ["text"], ["a"], ["a"] * 4, ["a"] * 5, [""], [0], [-1], [2**31], [True], [1.5], [[0]],
    [["a"]], [[]], ["a", [1]], {}, {"x": 1}, {"7": 1}, {"7": 101}, {"-7": 1}, {"12345678901": 1}, {"7": True},
    {"include_usage": True}, {"include_usage": None}, {"include_usage": 1}, {"enable_thinking": False},
    {"type": "text"}, {"type": "json_object"}, {"type": "json"}, {"type": "json_object", "json_schema": {}},
    {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string"}}},
    {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
    {"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "f", "x": 1}},
    [{"type": "function", "function": {"name": "f"}}], [{"type": "function", "function": {"name": "f f"}}],
    [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": None, "description": "d"}}],
    [{"type": "function", "function": {"name": "f", "parameters": []}}], [{"function": {"name": "f"}}],
    MESSAGES, [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user", "content": [{"text": 1}]}],
    [{"role": "tool", "content": "x", "tool_call_id": "i"}], [{"role": "robot", "content": "x"}], [{"content": "x"}],
    [{"role": "user", "content": "x", "name": "y" * 256}], [{"role": "user", "content": "x", "name": "y" * 257}],
    [{"role": "user", "content": "x", "annotations": []}], [{"role": "user", "content": "x", "annotations": [1]}],
    [{"role": "user", "content": "x", "refusal": "no"}], [{"role": "user", "content": "x", "reasoning_content": "r"}],
    [{"role": "assistant", "tool_calls": [{"id": "i", "type": "function", "function": CALLED}]}],
    [{"role": "assistant", "tool_calls": [{"type": "function", "function": CALLED}]}],
]  # fmt: skip


def reads(reader: Reader, body: Any) -> bool:
    try:
        reader(body, "")
    except ApiError:
        return False
    return True


def cases() -> Iterator[tuple[str, str]]:
    for path, (reader, _) in BODIES.items():
        assert reader.schema is not None
        for name in (*reader.schema["properties"], "suffix", "functions", "metadata", "unheard_of"):
            yield path, name


@pytest.mark.parametrize(("path", "name"), list(cases()))
def test_what_is_described_is_what_is_read(path: str, name: str) -> None:
    reader, basis = BODIES[path]
    schema = body_schema(SERVED, path)
    agreed = set()
    for value in PROBES:
        body = {**basis, name: value}
        if value is None and name in schema.get("required", ()):
            assert not reads(reader, body) and not fits(body, schema)
            continue
        if value is None and name not in schema["properties"]:
            continue  # a field that is known and refused may be null, which is the same as not given
        is_fit = fits(body, schema)
        assert reads(reader, body) == is_fit, value
        agreed.add(is_fit)
    assert agreed == ({True, False} if name in schema["properties"] else {False})


@pytest.mark.parametrize("path", BODIES)
def test_required_fields(path: str) -> None:
    reader, basis = BODIES[path]
    schema = body_schema(SERVED, path)
    assert fits(basis, schema) and reads(reader, basis)
    for name in schema.get("required", ()):
        without = {key: value for key, value in basis.items() if key != name}
        assert not fits(without, schema) and not reads(reader, without)


def test_a_field_whose_description_is_wrong_would_be_seen() -> None:
    """The control: a reader that takes more than its schema says, and one that takes less."""
    wider = Reader(lambda value, where: value, integer(1, 2).schema)
    narrower = Reader(integer(1, 2).read, {"type": "integer"})
    for each in (wider, narrower):
        body = object_of({"x": each})
        assert body.schema is not None
        assert any(reads(body, {"x": value}) != fits({"x": value}, body.schema) for value in PROBES)


def test_a_table_gives_its_description() -> None:
    body = object_of({"a": boolean, "b": text(most=3), "c": refused("it isn't there")}, ("a",))
    assert body.schema == {
        "type": "object",
        "properties": {
            "a": {"type": "boolean"},
            "b": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
        },
        "additionalProperties": False,
        "required": ["a"],
    }


def test_the_description_that_was_written_apart_says_nothing_else() -> None:
    """Each of its paths, statuses and fields is in the server's own; that has others besides."""
    for path, methods in APART["paths"].items():
        for method, said in methods.items():
            ours = SERVED["paths"][path][method]
            assert set(said["responses"]) <= set(ours["responses"]), path
            if method == "post":
                theirs, own = body_schema(APART, path), body_schema(SERVED, path)
                assert set(theirs["properties"]) <= set(own["properties"]), path
                assert set(own.get("required", ())) <= set(theirs.get("required", ())), path
                for name, schema in theirs["properties"].items():
                    # Whatever fits there fits here: bounds there are narrower, for short answers.
                    for value in PROBES:
                        if fits(value, schema):
                            assert fits(value, own["properties"][name]), (path, name, value)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/chat/completions", {"model": "toy", "messages": MESSAGES, "max_tokens": 3, "logprobs": True}),
        ("POST", "/v1/completions", {"model": "toy", "prompt": ["a", "b"], "max_tokens": 3, "n": 2, "logprobs": 1}),
        ("POST", "/tokenize", {"messages": MESSAGES}),
        ("POST", "/detokenize", {"tokens": [65, 66]}),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/{model}", None),
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("GET", "/version", None),
        ("GET", "/openapi.json", None),
    ],
)
def test_answers_are_as_described(method: str, path: str, body: Any) -> None:
    with App() as app:
        response = app.ask(method, path.replace("{model}", "toy"), json=body)
        said = SERVED["paths"][path][method.lower()]["responses"][str(response.status_code)]
        assert response.status_code == 200
        assert fits(response.json(), said["content"]["application/json"]["schema"]), response.text
        assert not fits({}, said["content"]["application/json"]["schema"]) or path == "/openapi.json"
        refused_ = app.ask(method, path.replace("{model}", "other"), json={"nothing": 1})
        if refused_.status_code >= 400:
            assert str(refused_.status_code) in SERVED["paths"][path][method.lower()]["responses"]
            assert fits(refused_.json(), SERVED["components"]["schemas"]["Error"])
