"""examples/dynamo: a worker of Dynamo's, by itself and behind its frontend, at 127.0.0.1 alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_aot.runtime.generation.generator import Generator
from tests.examples.conftest import ROOT, other_python
from tests.examples.ray_session import eventually, listening
from tests.examples.test_ray_serve import is_loopback

EXAMPLE = ROOT / "examples" / "dynamo"
SYSTEMS = ("You know the sea and its fish. " * 3, "You cook with herbs and cheese. " * 3)  # some blocks of 16 tokens


def variables(folder: Path) -> dict[str, str]:
    """For Dynamo on one machine: discovery by files, and loopback addresses."""
    found = {
        "PYTHONPATH": str(ROOT / "src"),
        "HOME": str(folder),
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "DYN_SELF_HOST_METADATA": "0",
        "OMP_WAIT_POLICY": "passive",
        "TMPDIR": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return os.environ | found


@pytest.mark.tools
def test_the_engine_by_itself(bundle: Path, tmp_path: Path) -> None:
    python = other_python("ray")
    done = subprocess.run(
        [python, Path(__file__).parent / "dynamo_engine.py", bundle],
        env=variables(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["files"] == ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert found["registered"] == ["m", 512, 16, 4 * 512 // 16, 4]

    ids = list(range(40))
    with Generator.open(bundle, threads=1) as generator:
        plain = generator.generate(ids, max_new_tokens=6, ignore_eos=True, logprobs=2)
        drawn = generator.generate(ids, max_new_tokens=6, ignore_eos=True, temperature=1.0, seed=5, n=2)
    *tokens, last = found["answer"]
    assert tokens == [{"token_ids": [token_id], "index": 0} for token_id in plain.token_ids]
    usage = {"prompt_tokens": 40, "completion_tokens": 6, "total_tokens": 46}
    details = {"prompt_tokens_details": {"cached_tokens": 0}}
    assert last == {"token_ids": [], "index": 0, "finish_reason": "length", "completion_usage": usage | details}
    assert found["again"]["completion_usage"]["prompt_tokens_details"]["cached_tokens"] == 38
    assert found["packed"][:-1] == tokens
    for choice in drawn:
        of_choice = [each["token_ids"] for each in found["choices"] if each["index"] == choice.choice]
        assert of_choice == [*([token_id] for token_id in choice.token_ids), []]
    first = plain.logprobs[0]
    assert found["logprobs"]["log_probs"] == [pytest.approx(first.token, abs=1e-4)]
    assert [each["token_id"] for each in found["logprobs"]["top_logprobs"][0]] == [each for each, _ in first.top]

    refused = {name: kind for name, (kind, _) in found["refused"].items()}
    assert set(refused.values()) == {"InvalidArgument"} and len(refused) == 5
    for name, part in {
        "guided": "guided_decoding has regex; this worker supports json alone",
        "schema": "guided_decoding.json.not is not supported",
        "unknown": "swirl is '1', which this worker doesn't support",
        "temperature": "temperature is -1; accepted",
        "long": "the prompt has 900 tokens, the context holds 512",
    }.items():
        assert part in found["refused"][name][1]
    with Generator.open(bundle, threads=1) as generator:
        assert generator.tokenizer is not None
        text = generator.tokenizer.decode([token for each in found["held"] for token in each["token_ids"]])
    assert text in ('"ab"', '"ac"') and found["held"][-1]["finish_reason"] == "stop"
    assert found["salted"] == [0, 38, 0, 38]
    assert found["full"][0] == "WorkerUnavailable"
    assert found["aborted"] == [["cancelled", True]] * 4
    assert (found["free"], found["at work"], found["folder"]) == (0, 0, False)


@dataclass
class Served:
    """A frontend with two workers."""

    client: httpx.Client
    workers: list[subprocess.Popen[str]]
    processes: list[subprocess.Popen[str]]
    log: Callable[[], str]


@contextlib.contextmanager
def served(bundle: Path, folder: Path) -> Iterator[Served]:
    python = other_python("ray")
    (folder / "discovery").mkdir()
    environment = variables(folder)
    processes: list[subprocess.Popen[str]] = []
    log = folder / "log"

    def start(*command: str | Path, **extra: Any) -> subprocess.Popen[str]:
        with log.open("a") as output:
            process = subprocess.Popen(
                [python, *command], cwd=folder, env=environment, stderr=output, text=True, stdout=subprocess.PIPE
            )
        processes.append(process)
        return process

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    planes = ["--discovery-backend", "file", "--event-plane", "zmq"]
    try:
        broker = start(EXAMPLE / "broker.py", "127.0.0.1", "0", "0")
        assert broker.stdout is not None
        environment["DYN_ZMQ_BROKER_URL"] = broker.stdout.readline().strip()
        options = ["--threads", "1", "--model-name", "m"]
        workers = [start(EXAMPLE / "worker.py", bundle, *planes, *options) for _ in range(2)]
        address = ["--http-host", "127.0.0.1", "--http-port", str(port)]
        start("-m", "dynamo.frontend", *address, *planes, "--router-mode", "kv")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            made = Served(client, workers, processes, log.read_text)
            assert eventually(lambda: is_ready(client, 2)), log.read_text()[-4000:]
            yield made
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            if process.stdout is not None:
                process.stdout.close()


def is_ready(client: httpx.Client, workers: int) -> bool:
    """Whether the model is listed and the router knows so many workers and where each tells what it holds."""
    with contextlib.suppress(httpx.HTTPError):
        names = [each["endpoint"] for each in client.get("/health").json()["instances"]]
        models = [each["id"] for each in client.get("/v1/models").json()["data"]]
        return models == ["m"] and names.count("generate") == workers and len(names) == 2 * workers
    return False


def heard_events(client: httpx.Client) -> dict[tuple[str, str], float]:
    """KV events that the router has heard, by kind and outcome."""
    found: dict[tuple[str, str], float] = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("dynamo_component_kv_cache_events_applied{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            found[labels["event_type"], labels["status"]] = float(line.rpartition(" ")[2])
    return found


def chat(client: httpx.Client, system: str, text: str, **more: Any) -> httpx.Response:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    body = {"model": "m", "messages": messages, "max_tokens": 6, "temperature": 0, **more}
    return client.post("/v1/chat/completions", json=body)


@pytest.mark.tools
def test_behind_the_frontend(bundle: Path, tmp_path: Path) -> None:
    with Generator.open(bundle, threads=1) as generator, served(bundle, tmp_path) as engine:
        client = engine.client
        messages = [{"role": "system", "content": SYSTEMS[0]}, {"role": "user", "content": "Hi"}]
        expected = generator.chat(messages, max_new_tokens=6)
        first = chat(client, SYSTEMS[0], "Hi").json()
        assert first["choices"][0]["message"]["content"] == expected.text
        assert first["usage"]["prompt_tokens"] == expected.prompt_tokens
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

        # A stream, and its end.
        body = {"model": "m", "messages": messages, "max_tokens": 6, "temperature": 0, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        text = "".join(each["choices"][0]["delta"].get("content") or "" for each in pieces if each["choices"])
        assert (text, lines[-1]) == (expected.text, "data: [DONE]") and len(pieces) > 2

        # Questions go where their beginning is, whichever worker that is.
        for number in range(3):
            for system in SYSTEMS:
                time.sleep(0.5)  # the router is told five times a second
                usage = chat(client, system, f"Question {number}").json()["usage"]
                if number > 0 or system is SYSTEMS[0]:
                    assert usage["prompt_tokens_details"]["cached_tokens"] > len(SYSTEMS[0]) // 2
        salted = chat(client, SYSTEMS[0], "Question 0", nvext={"cache_salt": "x"}).json()
        assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        events = heard_events(client)
        assert events["stored", "ok"] > 4
        assert all(outcome == "ok" for (_, outcome), count in events.items() if count), events

        grade = {"type": "object", "properties": {"grade": {"enum": ["A", "B"]}}, "required": ["grade"]}
        grade["additionalProperties"] = False
        asked = {"type": "json_schema", "json_schema": {"name": "grade", "schema": grade}}
        held = chat(client, SYSTEMS[0], "Hi", response_format=asked, max_tokens=60, frequency_penalty=2)
        assert json.loads(held.json()["choices"][0]["message"]["content"])["grade"] in ("A", "B")
        asked["json_schema"]["schema"] = {"not": {}}  # type: ignore[index]
        refused = chat(client, SYSTEMS[0], "Hi", response_format=asked)
        assert refused.status_code == 400 and "guided_decoding.json.not" in refused.text

        listens = [addresses for process in engine.processes for addresses in listening(process.pid).values()]
        assert len(listens) == len(engine.processes)  # broker, workers and frontend: each has one at least
        assert all(is_loopback(address) for addresses in listens for address in addresses), listens

        # A worker that is told to stop leaves the list; the other goes on, and what it is at finishes.
        engine.workers[0].send_signal(signal.SIGTERM)
        assert engine.workers[0].wait(60) == 0
        assert eventually(lambda: chat(client, SYSTEMS[1], "Still there?").status_code == 200)
        body |= {"max_tokens": 200, "ignore_eos": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            stream = response.iter_lines()
            next(stream)
            engine.workers[1].send_signal(signal.SIGTERM)
            lines = [line for line in stream if line]
        assert lines[-1] == "data: [DONE]" and any('"finish_reason":"length"' in line for line in lines), lines[-3:]
        assert engine.workers[1].wait(60) == 0
        assert not list(tmp_path.glob("**/qwen-aot-dynamo-*"))
    assert all(process.returncode in (0, -signal.SIGTERM) for process in engine.processes), engine.log()[-3000:]
