"""Users who talk to a server that speaks OpenAI's API, for Locust: streamed chats, and waits between them.

    locust --locustfile examples/load/locustfile.py --host http://127.0.0.1:8000 --headless --users 8 --run-time 1m

The variables MODEL (else the one that is listed), API_KEY and MAX_TOKENS (else 64) say what is asked. Besides whole
answers Locust's table then has a line for the time to the first text. A server whose queue is full answers 429, which
counts as a failure.
"""

import json
import os
import random
import time

from locust import HttpUser, between, task

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write a line about the sea.",
    "What is 7 times 8?",
)


class Reader(HttpUser):
    wait_time = between(0.5, 2)

    def on_start(self):
        key = os.environ.get("API_KEY")
        if key:
            self.client.headers["Authorization"] = f"Bearer {key}"
        self.model = os.environ.get("MODEL") or self.client.get("/v1/models").json()["data"][0]["id"]

    @task
    def chat(self):
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": random.choice(QUESTIONS)}],
            "max_tokens": int(os.environ.get("MAX_TOKENS", "64")),
            "stream": True,
        }
        start, first = time.perf_counter(), None
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
                return
            done = False
            for line in response.iter_lines():
                data = line.removeprefix(b"data: ")
                if data == b"[DONE]":
                    done = True
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        response.failure(event["error"]["message"])
                        return
                    if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                        first = time.perf_counter() - start
            if not done:
                response.failure("the stream ended before [DONE]")
                return
        if first is not None:
            self.environment.events.request.fire(
                request_type="", name="first text", response_time=first * 1000, response_length=0, exception=None
            )
