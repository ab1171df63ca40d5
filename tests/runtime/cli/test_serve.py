"""`serve` as a process: what it prints, how it ends, and the unmodified `openai` client against it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from qwen_aot.runtime.generation.generator import Generator
from tests.runtime.cli.conftest import Run
from tests.tools import require_tool

pytestmark = pytest.mark.timeout(120, func_only=True)
KEY = "the-key-0123456789"


class Server:
    """A process that serves, ready."""

    def __init__(self, process: subprocess.Popen[str], line: str) -> None:
        self.process = process
        self.line = line
        found = re.search(r"https?://[^\s\"]+", line)
        assert found, line
        self.url = found[0]

    def end(self, *numbers: signal.Signals) -> tuple[int, str]:
        """Sends signals; the exit code and what it wrote on standard error."""
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.3)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@contextlib.contextmanager
def serving(bundle: Path, *options: object, **variables: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "qwen_aot", "serve", str(bundle), "--port", "0", *map(str, options)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | variables
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate(timeout=30)[1])
        yield Server(process, line)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle, "--model-name", "tiny", "--threads", 1) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


MESSAGES: list[Any] = [{"role": "user", "content": "Hello"}]


def test_the_ready_line(server: Server) -> None:
    assert re.fullmatch(r"tiny at http://127\.0\.0\.1:\d+ \(1 row, context 256\); Ctrl-C stops it\n", server.line)
    assert len(server.line) <= 81
    assert "<title>qwen-aot</title>" in httpx.get(server.url).text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "qwen-aot"


def test_chat_is_what_the_generator_says(client: openai.OpenAI, bundle: Path) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, temperature=0)
    with Generator.open(bundle, threads=1) as generator:
        expected = generator.chat(MESSAGES, max_new_tokens=8, temperature=0)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason.value
    assert answer.usage is not None and answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens_details is not None
    stream = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant" and last.choices == []
    assert last.usage is not None and last.usage.total_tokens == answer.usage.total_tokens


def test_completions(client: openai.OpenAI, bundle: Path) -> None:
    answer = client.completions.create(model="tiny", prompt=["Hello", "World"], max_tokens=6, temperature=0, logprobs=2)
    with Generator.open(bundle, threads=1) as generator:
        expected = generator.generate(["Hello", "World"], max_new_tokens=6, temperature=0)
    assert [choice.text for choice in answer.choices] == [completion.text for completion in expected]
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.top_logprobs is not None
    echoed = client.completions.create(model="tiny", prompt="Hello", max_tokens=0, echo=True, logprobs=1)
    assert echoed.choices[0].text == "Hello"


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [3] * 5
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in logprobs.content)  # greedy
    text = b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode(errors="replace")
    assert text == answer.choices[0].message.content


class Verdict(pydantic.BaseModel):
    """What is asked for."""

    is_good: bool
    grade: Literal["A", "B"]


def test_an_answer_as_an_object(client: openai.OpenAI) -> None:
    """Of a model of random weights: nothing but the grammar makes it one."""
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200}
    asked |= {"frequency_penalty": 2, "presence_penalty": 2}  # else it repeats a blank as long as it may
    answer = client.chat.completions.parse(**asked, response_format=Verdict)
    assert isinstance(answer.choices[0].message.parsed, Verdict) and answer.choices[0].finish_reason == "stop"
    plain = client.chat.completions.create(**asked, response_format={"type": "json_object"}, temperature=0)
    text = plain.choices[0].message.content or ""
    assert text.startswith("{") and (plain.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict))


def test_the_same_question_again_is_cached(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "A question of its own, asked twice", "max_tokens": 5}
    first, again = (client.completions.create(**asked) for _ in range(2))
    assert first.choices[0].text == again.choices[0].text
    for answer, is_cached in ((first, False), (again, True)):
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached is not None and (cached > answer.usage.prompt_tokens // 2) is is_cached


def test_errors(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 400}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as format_:
        schema = {"name": "x", "schema": {"type": "string", "pattern": "("}}
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, response_format={"type": "json_schema", "json_schema": schema}
        )
    assert format_.value.param == "response_format.json_schema.schema"
    with pytest.raises(openai.BadRequestError, match="n is 2; accepted: at most 1"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, n=2)
    with pytest.raises(openai.NotFoundError, match="use /v1/chat/completions"):
        client.responses.create(model="tiny", input="Hi")
    with pytest.raises(openai.NotFoundError, match="a language model only"):
        client.embeddings.create(model="tiny", input="Hi")


def test_a_stream_that_the_client_leaves(client: openai.OpenAI, server: Server) -> None:
    with client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 30
    while 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' not in httpx.get(server.url + "/metrics").text:
        assert time.monotonic() < deadline


def test_sixteen_clients_at_once(client: openai.OpenAI) -> None:
    def ask(number: int) -> str | None:
        messages: list[Any] = [{"role": "user", "content": f"Number {number}"}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=10, temperature=0)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(16) as pool:
        at_once = list(pool.map(ask, range(16)))
    assert at_once == [ask(number) for number in range(16)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0)])
def test_it_ends_when_it_is_told_to(bundle: Path, number: signal.Signals, code: int) -> None:
    with serving(bundle, "--log-format", "json", QWEN_AOT_API_KEY=KEY) as server:
        ready = json.loads(server.line)
        assert ready["models"] == ["tiny-model"] and ready["rows"] == 1 and ready["ready"] == server.url
        assert httpx.get(server.url + "/version").status_code == 401
        assert httpx.get(server.url + "/version", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        ended, err = server.end(number)
    assert ended == code, err
    assert [json.loads(line)["status"] for line in err.splitlines()] == [401, 200]
    assert KEY not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_cuts(bundle: Path, number: signal.Signals, code: int) -> None:
    """Sixteen long answers take one row some seconds."""
    body = {"model": "tiny-model", "messages": MESSAGES, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    with serving(bundle, "--threads", 1, "--grace-seconds", 60) as server, ThreadPoolExecutor(16) as pool:
        url = server.url + "/v1/chat/completions"
        asked = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(16)]
        deadline = time.monotonic() + 30
        while not re.search(r"num_requests_waiting\S+ [1-9]", httpx.get(server.url + "/metrics").text):
            assert time.monotonic() < deadline
        ended, err = server.end(number, number)
        assert ended == code, err
        assert "Traceback" not in err
        assert {each.result(60).status_code for each in asked} <= {200, 503}


@pytest.mark.tools
def test_tls(bundle: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [require_tool("openssl", remedy="apt install openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(bundle, "--ssl-certfile", certificate, "--ssl-keyfile", key) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(server.url + "/health", verify=context).status_code == 200
        assert server.end(signal.SIGTERM)[0] == 0


def test_without_the_prefix_cache(bundle: Path) -> None:
    body = {"model": "tiny", "prompt": "A question of its own, asked twice", "max_tokens": 2}
    with serving(bundle, "--no-prefix-cache", "--model-name", "tiny", "--threads", 1) as server:
        for _ in range(2):
            usage = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_key_file(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\n{KEY}\n")
    with serving(bundle, "--api-key-file", tmp_path / "keys", "--host", "127.0.0.1", "--no-page") as server:
        assert httpx.get(server.url).status_code == 401
        wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as ours:
            assert [model.id for model in ours.models.list()] == ["tiny-model"]


def test_bundles_that_can_not_be_served(run: Run, bundle: Path, decisive: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("serve", decisive[1], "--port", 0)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the bundle has no tokenizer, so it can't be served" in " ".join(result.stderr.split())
    (tmp_path / "empty").mkdir()
    assert run("serve", tmp_path / "empty", "--port", 0).exit_code == 1
    result = run("serve", bundle, "--port", 0, "--rows", 2)
    assert result.exit_code == 1
    assert "rows is 2; accepted: 1 to 1, the bundle's own" in " ".join(result.stderr.split())


@pytest.mark.parametrize("package", ["uvicorn", "llguidance"])
def test_without_the_extra_the_message_says_how_to_get_it(package: str, bundle: Path) -> None:
    code = f"""
import sys
sys.modules["{package}"] = None
from qwen_aot.runtime.cli.main import qwen_aot
qwen_aot.main(prog_name="qwen-aot")
"""
    command = [sys.executable, "-c", code, "serve", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "[serve]" in done.stderr and "Traceback" not in done.stderr
    assert repr(package) in done.stderr
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0 and "Examples:" in helped.stdout
