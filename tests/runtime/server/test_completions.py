"""Text completions: prompts of every form, echoes, batches, and their log-probabilities."""

from __future__ import annotations

import pytest

from tests.runtime.server.servers import App, events, letters

HI = list(b"Hi")


def test_prompts_of_every_form() -> None:
    with App() as app:
        for prompt, ids in (
            ("Hi", [HI]),
            ([72, 105], [HI]),
            (["Hi", "Ho"], [HI, list(b"Ho")]),
            ([HI, [80]], [HI, [80]]),
        ):
            body = app.complete({"prompt": prompt}).json()
            assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
            assert body["choices"] == [
                {"index": index, "text": letters(each, 5), "logprobs": None, "finish_reason": "length"}
                for index, each in enumerate(ids)
            ]
            assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
            assert body["usage"]["completion_tokens"] == 5 * len(ids)


def test_a_control_token_that_a_prompt_spells_is_text() -> None:
    with App() as app:
        assert app.complete({"prompt": "<|end|>"}).json()["usage"]["prompt_tokens"] == len("<|end|>")
        assert app.complete({"prompt": [256, 72]}).json()["choices"][0]["text"] == letters([256, 72], 5)
        assert app.post("/tokenize", {"prompt": "<|end|>"}).json()["count"] == len("<|end|>")
        assert app.post("/tokenize", {"prompt": "<|end|>", "parse_special": True}).json()["tokens"] == [256]


def test_several_choices_of_several_prompts() -> None:
    asked = {"prompt": ["Hi", [80]], "n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 8}
    with App(rows=2) as app:
        body = app.complete(asked).json()
        chunks = events(app.complete({**asked, "stream": True}).text)
        singly = [app.complete({**asked, "prompt": prompt}).json()["choices"] for prompt in ("Hi", [80])]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 3 and body["usage"]["completion_tokens"] == 32
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == [choice["text"] for choices in singly for choice in choices]
    streamed = ["", "", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_echo() -> None:
    with App() as app:
        assert app.complete({"echo": True}).json()["choices"][0]["text"] == "Hi" + letters(HI, 5)
        assert app.complete({"echo": True, "prompt": HI}).json()["choices"][0]["text"] == "Hi" + letters(HI, 5)
        chunks = events(app.complete({"echo": True, "stream": True, "n": 2}).text)
        for index in range(2):
            texts = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert texts[0] == "Hi" and "".join(texts) == "Hi" + letters(HI, 5)


def test_the_log_probabilities_of_a_prompt_alone() -> None:
    with App() as app:
        body = app.complete({"prompt": "Hé!", "echo": True, "max_tokens": 0, "logprobs": 1}).json()
        plain = app.complete({"echo": True, "max_tokens": 0}).json()
        streamed = events(app.complete({"echo": True, "max_tokens": 0, "stream": True}).text)
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"]) == ("Hé!", "length")
    assert logprobs["tokens"] == ["H", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert list(logprobs["top_logprobs"][1]) == [letters(list(b"H"), 1)]
    assert body["usage"]["completion_tokens"] == 0
    assert plain["choices"][0]["text"] == "Hi" and plain["usage"]["total_tokens"] == 2
    assert "".join(choice["text"] for chunk in streamed for choice in chunk["choices"]) == "Hi"


def test_log_probabilities_of_an_answer() -> None:
    with App() as app:
        whole = app.complete({"logprobs": 2}).json()["choices"][0]["logprobs"]
        echoed = app.complete({"logprobs": 2, "echo": True}).json()["choices"][0]["logprobs"]
        chunks = events(app.complete({"logprobs": 2, "stream": True}).text)
    assert whole["tokens"] == list(letters(HI, 5)) and whole["text_offset"] == [0, 1, 2, 3, 4]
    assert all(len(top) == 2 for top in whole["top_logprobs"])
    assert echoed["tokens"] == [*"Hi", *whole["tokens"]] and echoed["text_offset"] == list(range(7))
    assert echoed["token_logprobs"][2:] == pytest.approx(whole["token_logprobs"], abs=1e-6)
    pieces = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert {name: [value for piece in pieces for value in piece[name]] for name in whole} == whole


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [1, -1]}, "prompt[0]"),
        ({"prompt": [300]}, None),
        ({"prompt": [1.0]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 20}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_refused(asked: dict[str, object], param: str | None) -> None:
    with App() as app:
        response = app.complete(asked)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param


def test_all_prompts_of_a_batch_or_none() -> None:
    with App(max_context=50) as app:
        response = app.complete({"prompt": ["Hi", "x" * 60]})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert app.state.admitted == 0
        service = app.state.model.service
        while service.statistics().submitted != service.statistics().ended:
            pass


def test_detokenize() -> None:
    with App() as app:
        assert app.post("/detokenize", {"tokens": [72, 105, 256]}).json() == {"prompt": "Hi<|end|>"}
        assert app.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
        for body, param in (
            ({"tokens": [300]}, "tokens"),
            ({"tokens": [2**40]}, "tokens"),
            ({"tokens": "x"}, "tokens"),
            ({}, "tokens"),
            ({"tokens": [1], "model": "other"}, "model"),
        ):
            assert app.post("/detokenize", body).json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}], "parse_special": True}, "parse_special"),
        ({"prompt": ["a"]}, "prompt"),
    ],
)
def test_what_tokenize_refuses(asked: dict[str, object], param: str) -> None:
    with App() as app:
        assert app.post("/tokenize", asked).json()["error"]["param"] == param
