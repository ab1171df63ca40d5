"""What tests/examples/test_ray_serve.py asks of the example, in a network of its own that has nothing but 127.0.0.1.

python -m tests.examples.ray_session PYTHON BUNDLE
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
PORT = 18400
URL = f"http://127.0.0.1:{PORT}"
MESSAGES = [{"role": "user", "content": "Hello"}]
LONG = {"model": "m", "messages": MESSAGES, "max_tokens": 400, "ignore_eos": True, "stream": True}


def start(python: str, bundle: str, folder: str) -> subprocess.Popen[str]:
    command = [python, ROOT / "examples/ray_serve/deployment.py", bundle, "--port", str(PORT), "--model-name", "m"]
    options = ["--rows", "1", "--max-replicas", "2", "--upscale-delay-seconds", "1"]
    variables = {"PYTHONPATH": str(ROOT / "src"), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": folder}
    variables |= {"OMP_WAIT_POLICY": "passive", "HOME": folder}
    with open(f"{folder}/log", "w") as log:
        return subprocess.Popen(
            [*command, *options], env=os.environ | variables, stdout=subprocess.PIPE, stderr=log, text=True
        )


def listening(root: int) -> dict[str, list[str]]:
    """Addresses that the example's processes listen at, by the process's name."""
    process = psutil.Process(root)
    found: dict[str, list[str]] = {}
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            for socket in each.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN or (socket.type.name == "SOCK_DGRAM" and socket.laddr):
                    found.setdefault(" ".join(each.cmdline())[:40], []).append(socket.laddr.ip)
    return found


def text_of(lines: list[str]) -> str:
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


def metric(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(lines[0].rpartition(" ")[2])


def eventually(condition: Any, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def session(process: subprocess.Popen[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with httpx.Client(base_url=URL, timeout=60, trust_env=False) as client:
        found["models"] = [each["id"] for each in client.get("/v1/models").json()["data"]]
        body = {"model": "m", "messages": MESSAGES, "max_tokens": 12, "ignore_eos": True}
        found["whole"] = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        found["streamed"], found["last"], found["events"] = text_of(lines), lines[-1], len(lines)
        refused = client.post("/v1/chat/completions", json={**body, "model": "other"})
        found["refused"] = [refused.status_code, refused.json()["error"]["code"]]

        # A reader that leaves: its row is free.
        with client.stream("POST", "/v1/chat/completions", json=LONG) as response:
            next(response.iter_lines())
        found["cancelled"] = eventually(
            lambda: (
                metric(client, 'vllm:request_success_total{engine="0",finished_reason="abort"') == 1
                and metric(client, "vllm:num_requests_running") == 0
            )
        )

        # More readers than rows: another replica starts. Each has loaded its bundle at another time.
        stop = threading.Event()

        def keep_asking() -> None:
            with httpx.Client(base_url=URL, timeout=60, trust_env=False) as own:
                while not stop.is_set():
                    own.post("/v1/chat/completions", json={**LONG, "stream": False})

        readers = [threading.Thread(target=keep_asking) for _ in range(4)]
        for reader in readers:
            reader.start()
        loaded: set[int] = set()

        def both_answer() -> bool:
            loaded.update(each["created"] for each in client.get("/v1/models").json()["data"])
            return len(loaded) > 1

        found["replicas"] = 2 if eventually(both_answer, 120) else len(loaded)
        found["listening"] = listening(process.pid)
        stop.set()
        for reader in readers:
            reader.join()

        # What is at work when it is told to stop finishes.
        with client.stream("POST", "/v1/chat/completions", json={**LONG, "max_tokens": 100}) as response:
            stream = response.iter_lines()
            first = [next(stream)]
            process.send_signal(signal.SIGTERM)
            lines = first + [line for line in stream if line]
        found["drained"] = [lines[-1], sum("content" in line for line in lines) > 50]
    found["exit"] = process.wait(60)
    return found


def main() -> None:
    python, bundle = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        process = start(python, bundle, folder)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("ready at"), Path(folder, "log").read_text()[-3000:]
            print(json.dumps(session(process)))
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for each in [*children, process]:
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    each.kill()


if __name__ == "__main__":
    main()
