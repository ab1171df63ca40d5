"""Turns: the assistant's messages of a conversation with the results of its calls, ready to be written as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.tool_formats.base import Call

__all__ = ["Step", "Turn", "text_of", "turns_of", "with_system"]


@dataclass(slots=True)
class Step:
    """One message of the assistant.

    Attributes:
        content: its text.
        calls: those that it made.
        results: theirs, by number; what isn't there yet is None.
    """

    content: str
    calls: list[Call] = field(default_factory=list)
    results: list[str | None] = field(default_factory=list)


@dataclass(slots=True)
class Turn:
    """The assistant's messages between two of others."""

    steps: list[Step]

    @property
    def is_open(self) -> bool:
        """Whether it ends with a call's result, so that the assistant has to go on."""
        return any(result is not None for result in self.steps[-1].results)


def turns_of(messages: Sequence[Mapping[str, Any]]) -> list[Turn | dict[str, Any]]:
    """A conversation in which each run of the assistant's and tools' messages is a turn; others have texts as contents.

    Args:
        messages: as `chat` has read them.

    Raises:
        ApiError: a result of a call that wasn't made, or has one.
    """
    found: list[Turn | dict[str, Any]] = []
    ids: list[str] = []  # of the calls of the last step
    for number, message in enumerate(messages):
        content, last = text_of(message["content"]), found[-1] if found else None
        if message["role"] == "assistant":
            calls = message.get("tool_calls", [])
            ids = [call["id"] for call in calls]
            step = Step(content, [_call(call["function"]) for call in calls], [None] * len(calls))
            if isinstance(last, Turn):
                last.steps.append(step)
            else:
                found.append(Turn([step]))
        elif message["role"] == "tool":
            step = last.steps[-1] if isinstance(last, Turn) else Step("")
            step.results[_place(message, step, ids, f"messages[{number}]")] = content
        else:
            found.append({**message, "content": content})
    return found


def text_of(content: str | Sequence[Mapping[str, str]]) -> str:
    """A content as a text; its parts are lines, as for templates that take none."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def with_system(messages: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """A conversation with a text at the end of its system message, or as that."""
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _call(function: Mapping[str, Any]) -> Call:
    return Call(function["name"], json.dumps(function["arguments"], ensure_ascii=False))


def _place(message: Mapping[str, Any], step: Step, ids: Sequence[str], where: str) -> int:
    """Which call's result a message is: the one of its id, or the first without a result."""
    given = message.get("tool_call_id")
    open_ = [n for n, result in enumerate(step.results) if result is None]
    fitting = open_ if given is None else [n for n in open_ if ids[n] == given]
    if not fitting:
        message_ = f"{where} is the result of no call; accepted: one for each of tool_calls before it, by tool_call_id"
        raise ApiError(400, message_, code="invalid_value", param=where if given is None else f"{where}.tool_call_id")
    return fitting[0]
