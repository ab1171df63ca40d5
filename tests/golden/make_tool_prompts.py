"""Writes tool_prompts.json: conversations with functions as Qwen-Agent tells them to models, in its two formats.

    python -m tests.golden.make_tool_prompts

Needs Qwen-Agent 0.0.34 (`pip install qwen-agent`), which is the reference: nothing of this repository is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_agent.llm.fncall_prompts.nous_fncall_prompt import NousFnCallPrompt
from qwen_agent.llm.fncall_prompts.qwen_fncall_prompt import QwenFnCallPrompt
from qwen_agent.llm.schema import ContentItem, FunctionCall, Message

OUT = Path(__file__).with_name("tool_prompts.json")

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Größe egal"}},
    "required": ["city"],
}
FUNCTIONS = [
    {"name": "weather", "description": "The weather of a city", "parameters": PARAMETERS},
    {"name": "time", "description": "The time", "parameters": {"type": "object", "properties": {}}},
]


def call(name: str, call_id: str, **arguments: Any) -> dict[str, Any]:
    written = json.dumps(arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": written}}


def result(call_id: str, content: str) -> dict[str, str]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


SYSTEM = {"role": "system", "content": "Be terse."}
USER = {"role": "user", "content": "How is the weather in Köln?"}
ONE = {"role": "assistant", "content": "", "tool_calls": [call("weather", "a", city="Köln")]}
TWO = {
    "role": "assistant",
    "content": "Let me see.",
    "tool_calls": [call("weather", "a", city="Köln"), call("time", "b")],
}
FINAL = {"role": "assistant", "content": "It rains."}
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [SYSTEM, USER, ONE, result("a", "rain")],
    [USER, ONE, result("a", "rain"), FINAL, USER],
    [USER, TWO, result("a", "rain"), result("b", "noon")],
    [SYSTEM, USER, TWO, result("a", "rain"), result("b", "noon"), FINAL, USER, ONE, result("a", "sun")],
    [USER, ONE, result("a", "rain"), TWO, result("a", "sun"), result("b", "noon")],
]


def theirs(messages: list[dict[str, Any]]) -> list[Message]:
    """Qwen-Agent has one call a message, and the text before it in a message of its own."""

    def content(text: str) -> list[ContentItem]:
        return [ContentItem(text=text)] if text else []

    found = []
    for message in messages:
        if message["role"] == "tool":
            found.append(Message(role="function", name="f", content=content(message["content"])))
            continue
        if message["content"]:
            found.append(Message(role=message["role"], content=content(message["content"])))
        calls = [FunctionCall(**each["function"]) for each in message.get("tool_calls", [])]
        found += [Message(role="assistant", content=[], function_call=each) for each in calls]
    return found


def main() -> None:
    cases = []
    for name, prompt in (("qwen", QwenFnCallPrompt()), ("hermes", NousFnCallPrompt())):
        for parallel in (False, True):
            for messages in CONVERSATIONS:
                told = prompt.preprocess_fncall_messages(
                    messages=theirs(messages), functions=FUNCTIONS, lang="en", parallel_function_calls=parallel
                )
                texts = [[each.role, "".join(item.text for item in each.content)] for each in told]
                cases.append({"format": name, "parallel": parallel, "messages": messages, "told": texts})
    document = {"functions": FUNCTIONS, "cases": cases}
    OUT.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
