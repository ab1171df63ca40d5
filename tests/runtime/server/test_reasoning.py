"""Thoughts over HTTP: told apart from answers, whole and streamed, with all that may be asked for beside them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.generation.request import Completion, FinishReason, Timings, TokenEvent
from qwen_aot.runtime.server.reasoning import ThoughtSplitter, answer_of, reasoning_of
from qwen_aot.runtime.text.thoughts import Part
from tests.chat_templates import QWEN3_WHOLE
from tests.runtime.server.servers import END, TEMPLATE, App, events, script_ids
from tests.runtime.server.test_tools import ASKED, CALL, NAMED, TAKES_TOOLS, WEATHER

# As Qwen3's: a thought is the model's to begin; an empty one stands where none is wanted.
EMPTY = "<think>\n\n</think>\n\n"
THINKS = TEMPLATE.replace("{{ message.content }}", "{% if message.reasoning_content %}<think>\n"
    "{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}").replace(
    "{% if enable_thinking %}think{% endif %}",
    "{% if enable_thinking is defined and not enable_thinking %}" + EMPTY + "{% endif %}",
)  # fmt: skip
# As QwQ's: the prompt begins the thought.
OPENS = TEMPLATE.replace("{% if enable_thinking %}think{% endif %}", "<think>\n{{ '' if '</think>' else '' }}")
TEMPLATES = {"thinks": THINKS, "opens": OPENS}
SAID = "<think>\nOne.\n\nTwo é.\n</think>\n\nThree.\n"
LONG: dict[str, Any] = {"max_tokens": 200}
JSON = {"response_format": {"type": "json_object"}}
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


def answered(script: str, asked: dict[str, Any], template: str = THINKS, **options: Any) -> dict[str, Any]:
    """The one choice of a whole answer, which the streamed one has to equal."""
    with App(script=script, template=template, max_context=1500, **options) as app:
        response = app.chat(LONG | asked)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        chunks = events(app.chat(LONG | asked | {"stream": True}).text)
    assert joined(chunks) == {
        "reasoning_content": choice["message"].get("reasoning_content", ""),
        "content": choice["message"]["content"] or "",
        "calls": [call["function"] for call in choice["message"].get("tool_calls", [])],
        "finish_reason": choice["finish_reason"],
    }
    found: dict[str, Any] = choice
    return found


def joined(chunks: list[Any]) -> dict[str, Any]:
    """What the deltas of a stream add up to; a thought's come before the answer's."""
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    kinds = [key for delta in deltas for key in ("reasoning_content", "content") if delta.get(key)]
    assert kinds == sorted(kinds, reverse=True)
    calls: list[dict[str, str]] = []
    for call in (call for delta in deltas for call in delta.get("tool_calls", [])):
        if call["index"] == len(calls):
            calls.append({"name": call["function"]["name"], "arguments": ""})
        calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return {
        **{key: "".join(delta.get(key) or "" for delta in deltas) for key in ("reasoning_content", "content")},
        "calls": calls,
        "finish_reason": chunks[-1]["choices"][0]["finish_reason"],
    }


def told(choice: dict[str, Any]) -> tuple[str | None, str | None, str]:
    message = choice["message"]
    return message.get("reasoning_content"), message["content"], choice["finish_reason"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_thought_and_an_answer(name: str) -> None:
    choice = answered(SAID, {}, TEMPLATES[name])
    assert told(choice) == ("One.\n\nTwo é.", "Three.\n", "stop")


def test_without_a_thought_the_answer_is_as_it_was_said() -> None:
    said = "\n\nThree </think> four.\n"
    assert told(answered(said, {})) == (None, said, "stop")
    assert told(answered(EMPTY + "Three.", {})) == (None, "Three.", "stop")


def test_a_model_that_has_none_says_marks_as_text() -> None:
    """The negative control: the same script behind a template that knows nothing of thoughts."""
    assert told(answered(SAID, {}, TEMPLATE)) == (None, SAID, "stop")


def test_no_thinking_is_wanted() -> None:
    with App(template=THINKS) as app:
        asked = {"messages": [{"role": "user", "content": "Hi"}]}
        plain = app.post("/tokenize", asked).json()["tokens"]
        assert app.post("/tokenize", asked | NO_THINKING).json()["tokens"] == [*plain, *script_ids(EMPTY)]
    assert told(answered(EMPTY + "<think>x</think>y", NO_THINKING)) == (None, "<think>x</think>y", "stop")


@pytest.mark.parametrize("name", TEMPLATES)
def test_max_tokens_in_the_thought(name: str) -> None:
    said = SAID.removeprefix("<think>\n" if name == "opens" else "")
    length = script_ids(said).index(ord("T")) + 1
    choice = answered(SAID, {"max_tokens": length}, TEMPLATES[name])
    assert told(choice) == ("One.\n\nT", "", "length")
    choice = answered(SAID, {"max_tokens": length + len("wo ") + 1}, TEMPLATES[name])  # in the middle of a character
    assert told(choice) == ("One.\n\nTwo \ufffd", "", "length")


def test_it_ends_in_the_thought() -> None:
    assert told(answered("<think>\nOne.\n", {})) == ("One.", "", "stop")
    assert told(answered("<think>", {})) == (None, "", "stop")


def test_stop_texts_count_behind_the_thought() -> None:
    assert told(answered(SAID, {"stop": ["e"]})) == ("One.\n\nTwo é.", "Thr", "stop")
    assert told(answered(SAID, {"stop": ["think", "One"]})) == ("One.\n\nTwo é.", "Three.\n", "stop")
    assert told(answered(SAID, {"stop": ["e"]}, TEMPLATE)) == (None, SAID[: SAID.index("e")], "stop")  # the control


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("stop", [["\n"], ["\n\n"], ["\n", "\n\nz"], ["\n\n", "\n\n\nz"]])
def test_line_ends_before_the_answer_stop_nothing(template: str, stop: list[str]) -> None:
    """They stand behind every thought and are no part of the answer, in which the same stop text ends it."""
    said = "<think>\nOne.</think>\n\nAnswer here\n\nand more"
    choice = answered(said, {"stop": stop}, TEMPLATES[template])
    assert told(choice) == ("One.", "Answer here", "stop")
    assert told(answered(said.partition("\n\nand")[0], {"stop": stop}, TEMPLATES[template])) == told(choice)
    assert told(answered("\n\nAnswer", {"stop": stop}, THINKS)) == (None, "", "stop")  # the control: no thought


def test_a_stop_text_that_begins_with_line_ends_stops_at_once() -> None:
    assert told(answered("<think>One.</think>\n\nEnd: x", {"stop": ["\nEnd:"]})) == ("One.", "", "stop")


def test_a_character_that_a_mark_cuts_is_the_thoughts() -> None:
    """The first byte of two comes, and then the mark: whole and streamed, no text is lost."""
    assert told(answered("<think>\nA\udcc3</think>B", {})) == ("A\ufffd", "B", "stop")
    assert told(answered("<think>\nA\n\udcc3</think>\n\udcc3", {})) == ("A\n\ufffd", "\ufffd", "stop")


def test_tokens_are_counted_and_have_log_probabilities() -> None:
    with App(script=SAID, template=THINKS, max_context=1000) as app:
        whole = app.chat(LONG | {"logprobs": True}).json()
        chunks = events(app.chat(LONG | {"logprobs": True, "stream": True}).text)
        counted = events(app.chat(LONG | {"stream": True, "stream_options": {"include_usage": True}}).text)[-1]
        assert "completion_tokens_details" not in app.chat(LONG | NO_THINKING).json()["usage"]
    ids = script_ids(SAID)
    for usage in (whole["usage"], counted["usage"]):
        assert usage["completion_tokens"] == len(ids)
        assert usage["completion_tokens_details"] == {"reasoning_tokens": ids.index(258) + 1}
    with App(script=f"\n {SAID}", template=THINKS, max_context=1000) as app:  # whitespace before it is the thought's
        assert app.chat(LONG).json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == ids.index(258) + 3
    entries = whole["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == SAID
    streamed = [each for chunk in chunks for each in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert streamed == entries


def test_several_choices() -> None:
    with App(script=SAID, template=THINKS, max_context=1000) as app:
        choices = app.chat(LONG | {"n": 3}).json()["choices"]
        chunks = events(app.chat(LONG | {"n": 3, "stream": True}).text)
    assert [told(choice) for choice in choices] == [("One.\n\nTwo é.", "Three.\n", "stop")] * 3
    for number in range(3):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == number]
        assert joined(own)["reasoning_content"] == "One.\n\nTwo é." and joined(own)["content"] == "Three.\n"


@pytest.mark.parametrize("name", TEMPLATES)
def test_json_is_held_behind_the_thought(name: str) -> None:
    choice = answered('<think>\n{"no": json </tool_call>\n</think>{"a": [1]}', JSON, TEMPLATES[name])
    assert told(choice) == ('{"no": json </tool_call>', '{"a": [1]}', "stop")


def test_json_without_a_thought() -> None:
    assert told(answered('{"a": 1}', JSON)) == (None, '{"a": 1}', "stop")
    assert told(answered(EMPTY + '{"a": 1}', JSON | NO_THINKING)) == (None, '{"a": 1}', "stop")


@pytest.mark.parametrize("said", ["Hm", "<think>Hm</think>Hm", "{}<think>"])
def test_what_a_model_would_rather_say_is_held(said: str) -> None:
    """Text in the place of JSON, before and behind a thought: what comes is an object, or was cut."""
    reasoning, content, reason = told(answered(said, JSON | {"max_tokens": 12}))
    assert reasoning == ("Hm" if said.startswith("<") else None) and content and content.startswith("{")
    assert reason == "length" or isinstance(json.loads(content), dict)


def test_a_held_answer_does_not_end_in_its_thought() -> None:
    reasoning, content, reason = told(answered("<think>Hm", JSON | {"max_tokens": 12}))
    assert reasoning is not None and reasoning.startswith("Hm") and (content, reason) == ("", "length")
    assert told(answered("<think>Hm", {"max_tokens": 12})) == ("Hm", "", "stop")  # the control: nothing holds it


def test_calls_of_functions() -> None:
    template = TAKES_TOOLS + "{{ '' if '</think>' else '' }}"
    said = f"<think>\n{CALL} no\n</think>\n\nNow.\n{CALL}"
    choice = answered(said, ASKED, template)
    assert told(choice) == (f"{CALL} no", "Now.", "tool_calls") and len(choice["message"]["tool_calls"]) == 1
    for asked in ({"tool_choice": "required"}, {"tool_choice": NAMED}):
        choice = answered(f"<think>\nHm.\n</think>{CALL}", ASKED | asked, template)
        assert choice["message"]["reasoning_content"] == "Hm." and choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Köln"}


@pytest.mark.parametrize(("name", "stop"), [("react", "Observation:"), ("qwen", "✿RESULT✿")])
def test_the_stops_of_a_format_count_behind_the_thought(name: str, stop: str) -> None:
    said = f"<think>{stop} of rain?</think>It rains.\n{stop} no"
    choice = answered(said, {"tools": [WEATHER]}, tool_format=name)
    assert told(choice) == (f"{stop} of rain?", "It rains.\n", "stop")


def test_an_answer_that_goes_on_has_an_empty_thought() -> None:
    """✿RETURN✿ stands in the answer, and a prompt that begins a thought would have it in there."""
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    said = "\n<think>No</think>"  # behind its beginning it is past its thought
    script = f"<think>\n\n</think>\n\n✿FUNCTION✿: weather\n✿ARGS✿: {{}}\n✿RESULT✿: rain\n✿RETURN✿{said}"
    with App(template=OPENS, tool_format="qwen", max_context=2000, script=script) as app:
        asked = {"messages": messages, "tools": [WEATHER]}
        ids = app.post("/tokenize", asked).json()["tokens"]
        begun = "✿FUNCTION✿: weather\n✿ARGS✿: {}\n✿RESULT✿: rain\n✿RETURN✿"
        tail = script_ids(f"[assistant]<think>\n\n</think>\n\n{begun}")
        assert ids[-len(tail) :] == tail
        answer = app.chat(asked | LONG).json()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert told(answer["choices"][0]) == (None, said, "stop")


def test_earlier_thoughts_are_the_templates_business() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    with App(template=THINKS) as app:
        ids = app.post("/tokenize", {"messages": messages}).json()["tokens"]
        plain = app.post("/tokenize", {"messages": [{**messages[1], "reasoning_content": None}]}).json()["tokens"]
    spelled = "[user]Hi\0[assistant]<think>\nHm.\n</think>\n\nYes?\0[user]Go\0[assistant]"
    assert ids == [END if token_id == 0 else token_id for token_id in script_ids(spelled)]
    assert 257 not in plain


def test_qwen3_keeps_the_thoughts_of_a_turn_that_goes_on() -> None:
    """Its published template: thoughts since the user's last message stay, with their calls, and older ones don't."""
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "reasoning_content": "Old.", "content": "Yes?"},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "reasoning_content": "New.", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "no"},
    ]
    with App(template=QWEN3_WHOLE, max_context=2000) as app:
        ids = app.post("/tokenize", {"messages": messages, "tools": [WEATHER]}).json()["tokens"]
    text = "".join({257: "<think>", 258: "</think>"}.get(each) or chr(each) for each in ids)
    assert (
        text.encode("latin-1")
        .decode()
        .endswith(
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\nNew.\n</think>\n\n"
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>\n'
            "<|im_start|>user\n<tool_response>\nno\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        )
    )


def test_completions_say_everything() -> None:
    with App(script=SAID, template=THINKS, max_context=1000) as app:
        answer = app.complete({"prompt": "[assistant]", "max_tokens": 200}).json()
    assert answer["choices"][0]["text"] == SAID


def completion(parts: list[tuple[Part, str]], last: str) -> Completion:
    thought = "".join(text for part, text in parts if part is Part.THOUGHT)
    before = [each for each in parts if each[0] is not Part.ANSWER]
    is_cut = bool(parts) and parts[-1][0] is Part.THOUGHT
    return Completion(
        0, (0,) * len(parts), "".join(text for _, text in parts) + last, last, FinishReason.STOP, 1, 0, (),
        Timings(0, 0, 0), thought=thought + (last if is_cut else ""),
        thought_characters=sum(len(text) for _, text in before) + (len(last) if is_cut else 0),
        thought_tokens=len(before),
    )  # fmt: skip


def test_nothing_was_said() -> None:
    assert completion([], "").last_part is Part.ANSWER


TEXTS = st.lists(st.text("a\n ", max_size=4), max_size=6)


@given(thought=TEXTS, answer=TEXTS, last=st.text("a\n", max_size=3), kind=st.sampled_from(["cut", "ended", "none"]))
def test_how_a_text_is_cut_changes_nothing(thought: list[str], answer: list[str], last: str, kind: str) -> None:
    parts = [(Part.ANSWER, text) for text in answer]
    if kind == "ended":
        parts = [(Part.THOUGHT, text) for text in thought] + [(Part.MARK, "</think>"), *parts]
    elif kind == "cut":
        parts = [(Part.MARK, "<think>")] + [(Part.THOUGHT, text) for text in thought]
        last = last if thought else ""
    end = completion(parts, last)
    splitter = ThoughtSplitter()
    pushed = [splitter.push(TokenEvent(0, 0, text, None, part=part)) for part, text in parts] + [splitter.push(end)]
    assert "".join(each[0] for each in pushed) == reasoning_of(end)
    assert "".join(each[1] for each in pushed) == answer_of(end)
    whole = "".join(answer) + last
    assert answer_of(end) == {"cut": "", "ended": whole.lstrip("\n"), "none": whole}[kind]
    assert reasoning_of(end) == {"cut": "".join(thought) + last, "ended": "".join(thought), "none": ""}[kind].strip(
        "\n"
    )
