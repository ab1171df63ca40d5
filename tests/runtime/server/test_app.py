"""Paths that only look at the server, and what every path has around it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_aot.runtime.bundle.manifest import KernelGraph
from qwen_aot.version import __version__
from tests.runtime.server.servers import App


def test_models() -> None:
    with App(model_names=("gpt", "a/b")) as app:
        listed = app.ask("GET", "/v1/models").json()
        assert listed["object"] == "list"
        assert [entry["id"] for entry in listed["data"]] == ["gpt", "a/b"]
        assert app.ask("GET", "/v1/models/a/b").json() == listed["data"][1]
        assert listed["data"][0]["max_model_len"] == 400
        assert listed["data"][0]["input_modalities"] == ["text"] and "image_tokens" not in listed["data"][0]
        missing = app.ask("GET", "/v1/models/toy")
        assert missing.status_code == 404
        assert missing.json()["error"] == {
            "message": "the model 'toy' does not exist; this server has 'gpt' or 'a/b'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }


def test_health_ready_and_version() -> None:
    with App() as app:
        assert app.ask("GET", "/health").json() == {"status": "ok", "phase": "ready"}
        assert app.ask("GET", "/ready").status_code == 200
        assert app.ask("GET", "/version").json() == {"version": __version__, "kernels": "onnxruntime"}


def test_version_names_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with App(is_loaded=False) as app:
        manifest = app.engine.manifest
        text = manifest.engines.text
        text = replace(text, kernels=KernelGraph(text.file, 1, "float16"))  # as a runtime that chose its graph has it
        chosen = replace(manifest, engines=replace(manifest.engines, text=text))
        monkeypatch.setattr(type(app.engine), "manifest", property(lambda _: chosen))
        app.state.start(app.generator)
        assert app.ask("GET", "/version").json()["kernels"] == "own"


def test_version_names_no_kernels_before_there_are_any() -> None:
    with App(is_loaded=False) as app:
        assert app.ask("GET", "/version").json() == {"version": __version__, "kernels": None}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/toy", "/ready"])
def test_before_the_model_is_there_and_once_the_server_stops(path: str) -> None:
    with App(is_loaded=False) as app:
        early = app.ask("GET", path)
        assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
        assert int(early.headers["retry-after"]) > 0
        assert app.ask("GET", "/health").json() == {"status": "ok", "phase": "loading"}
        assert app.chat({}).json()["error"]["code"] == "loading"
        app.state.start(app.generator)
        assert app.ask("GET", path).status_code == 200
        app.state.drain()
        late = app.ask("GET", path)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
        assert app.chat({}).status_code == app.complete({}).status_code == 503
        assert app.ask("GET", "/health").status_code == 200


def test_a_model_that_comes_when_the_server_stops_is_not_used() -> None:
    with App(is_loaded=False) as app:
        app.state.drain()
        app.state.start(app.generator)
        assert app.chat({}).json()["error"]["code"] == "stopping"


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("POST", "/v1/responses", 404, "use /v1/chat/completions"),
        ("POST", "/v1/embeddings", 404, "a language model only"),
        ("GET", "/nothing", 404, "docs/serving.md has those that exist"),
        ("GET", "/v1/chat/completions", 405, "accepted: POST"),
        ("DELETE", "/v1/models", 405, "accepted: GET"),
    ],
)
def test_what_is_not_there_says_so_in_the_apis_form(method: str, path: str, status: int, said: str) -> None:
    with App() as app:
        response = app.ask(method, path)
        assert response.status_code == status
        error = response.json()["error"]
        assert said in error["message"].replace(", HEAD", "").replace("HEAD, ", "")
        assert error["type"] == "invalid_request_error" and error.keys() == {"message", "type", "param", "code"}


def test_each_response_has_an_id_of_its_own() -> None:
    with App() as app:
        ids = {app.ask("GET", path).headers["x-request-id"] for path in ("/health", "/health", "/nothing", "/metrics")}
        assert len(ids) == 4


def test_a_fault_of_ours_is_told_without_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with App() as app:

        def explode(*arguments: object) -> None:
            raise RuntimeError("the secret")

        monkeypatch.setattr("qwen_aot.runtime.server.chat.check_model", explode)
        response = app.chat({})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in response.text
        assert app.complete({}).status_code == 200
