"""What chat templates do with a content besides writing it: named rules, each told by what it makes of probes.

`runtime/capi/src/text/chat_template.cpp` has the same rules under the same numbers; docs/compiled-text.md states them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["PROBES", "WHITESPACE", "Part", "Query", "Rule", "after_query", "apply"]

THOUGHT_OPEN = "<think>\n"
THOUGHT_CLOSE = "\n</think>\n\n"

# What `str.strip` takes off, spelled out for readers whose language has another set.
WHITESPACE = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a rendered text: the template's own, or one of a message's."""

    text: str
    is_own: bool


class Rule(enum.IntEnum):
    """What becomes of a message's content. The numbers stand in files."""

    AS_IS = 0
    TRIM = 1  # without whitespace around it
    ANSWER = 2  # if it holds </think>: what is behind the last, without line ends before it
    ANSWER_ALWAYS = 3  # what is behind the last </think>, if there is one, without line ends before it
    ANSWER_BARE = 4  # what is behind the last </think>, if there is one
    ANSWER_TRIM = 5  # the same without whitespace around it
    THOUGHT = 6  # the thought in <think> and </think>, even an empty one, and the answer
    THOUGHT_IF_ANY = 7  # the same if there is a thought, else the answer


class Query(enum.IntEnum):
    """Behind which message thoughts are kept. The numbers stand in files."""

    NONE = 0  # the template doesn't ask
    LAST_USER = 1  # the last of the user's
    LAST_USER_SPEAKING = 2  # the last of the user's that isn't <tool_response>...</tool_response>


def _thought(content: str) -> str:
    if "</think>" not in content:
        return ""
    return content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")


def _answer(content: str) -> str:
    return content.split("</think>")[-1].lstrip("\n") if "</think>" in content else content


def _with_thought(content: str) -> list[Part]:
    return [
        Part(THOUGHT_OPEN, is_own=True),
        Part(_thought(content).strip("\n"), is_own=False),
        Part(THOUGHT_CLOSE, is_own=True),
        Part(_answer(content).lstrip("\n"), is_own=False),
    ]


def _text(text: str) -> list[Part]:
    return [Part(text, is_own=False)]


_APPLY: dict[Rule, Callable[[str], list[Part]]] = {
    Rule.AS_IS: _text,
    Rule.TRIM: lambda content: _text(content.strip(WHITESPACE)),
    Rule.ANSWER: lambda content: _text(_answer(content)),
    Rule.ANSWER_ALWAYS: lambda content: _text(content.split("</think>")[-1].lstrip("\n")),
    Rule.ANSWER_BARE: lambda content: _text(content.split("</think>")[-1]),
    Rule.ANSWER_TRIM: lambda content: _text(content.split("</think>")[-1].strip(WHITESPACE)),
    Rule.THOUGHT: _with_thought,
    Rule.THOUGHT_IF_ANY: lambda content: _with_thought(content) if _thought(content) else _text(_answer(content)),
}

# Contents that tell the rules apart; where the word stands, each rule leaves it in.
PROBES = (
    "word",
    " \t\n word \u00a0\n",
    "\n\nword",
    "a</think>\n\n word ",
    "</think>word",
    "<think>\na\n</think>\n\nb</think>\nword\n",
    "<think>\n\n</think>\n\nword",
    "x<think>\n\na\n<think>\nb\n</think>word",
)


def apply(rule: Rule, content: str) -> list[Part]:
    """What a rule makes of a content: the template's own parts and the message's, joined in this order."""
    return _APPLY[rule](content)


def after_query(query: Query, messages: Sequence[tuple[str, str]]) -> int:
    """Where the messages begin whose thoughts are kept: the number of the first; of all messages if there are none.

    Args:
        query: the rule.
        messages: role and content of each.
    """
    if query is Query.NONE:
        return len(messages)
    for index in range(len(messages) - 1, -1, -1):
        role, content = messages[index]
        if role == "user" and not (query is Query.LAST_USER_SPEAKING and _is_tool_response(content)):
            return index + 1
    return len(messages)


def _is_tool_response(content: str) -> bool:
    return content.startswith("<tool_response>") and content.endswith("</tool_response>")
