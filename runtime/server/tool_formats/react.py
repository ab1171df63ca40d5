"""The format ReAct: Question, Thought, Action, Action Input, Observation, as Qwen's models were trained on it.

The functions stand with the last question, and what came of it so far behind them. An answer is the next thought, and
an action or the final answer.

Source: https://github.com/QwenLM/Qwen-Agent/blob/main/qwen_agent/agents/react_chat.py;
Yao et al., "ReAct" (2022), https://arxiv.org/abs/2210.03629
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.tool_formats.base import Call, CallSyntax, Function, Offer, Told
from qwen_aot.runtime.server.tool_formats.marked_reader import MarkedReader, named_call, read_json
from qwen_aot.runtime.server.tool_formats.turns import Turn, turns_of

__all__ = ["React"]

_PROMPT = """Answer the following questions as best you can. You have access to the following tools:

{functions}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {question}
Thought: """

MAX_THOUGHT = 200  # characters before a call that is required


class React:
    """See `ToolFormat`."""

    name = "react"
    stops = ("Observation:",)
    syntax = CallSyntax(
        mark="\nAction:",
        before_arguments=" {name}\nAction Input: ",
        end="\nObservation:",
        lead=rf"[^\n]{{0,{MAX_THOUGHT}}}",
    )

    def fits(self, template_literals: Collection[str]) -> bool:
        """See `ToolFormat`."""
        return any("Action Input:" in text for text in template_literals)

    def tell(self, messages: Sequence[Mapping[str, Any]], offer: Offer | None) -> Told:
        """See `ToolFormat`."""
        turns = turns_of(messages)
        so_far, last = "", turns[-1]
        if isinstance(last, Turn) and last.is_open:
            so_far = _written(last)
            turns.pop()
        if offer is None:
            return Told(_told(turns), so_far)
        question = turns.pop() if turns else None
        if not isinstance(question, dict) or question["role"] != "user":
            message = "the last message has to be the user's, or the result of a call that followed it"
            raise ApiError(400, message, code="invalid_value", param="messages")
        functions = "\n\n".join(map(_described, offer.functions))
        text = _PROMPT.format(functions=functions, names=",".join(offer.names), question=question["content"])
        return Told([*_told(turns), {**question, "content": text + so_far.removeprefix("Thought: ")}])

    def reader(self, names: Collection[str], *, is_continued: bool) -> MarkedReader:
        """See `ToolFormat`. An answer may begin with its action."""
        return MarkedReader(self.syntax.mark, "", lambda inside: _call(inside, names), unsaid="\n")


def _told(turns: Sequence[Turn | dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": _written(each)} if isinstance(each, Turn) else each for each in turns]


def _written(turn: Turn) -> str:
    if not any(step.calls for step in turn.steps):
        return "".join(step.content for step in turn.steps)
    text = "Thought: "
    for step in turn.steps:
        text += step.content
        for call, result in zip(step.calls, step.results, strict=True):
            text += f"\nAction: {call.name}\nAction Input: {call.arguments}"
            text += "" if result is None else f"\nObservation: {result}\nThought: "
    return text


def _described(function: Function) -> str:
    """A function, as the prompt has it."""
    return (
        f"{function.name}: Call this tool to interact with the {function.name} API. What is the {function.name} API "
        f"useful for? {function.description} Parameters: {function.parameters_text}"
    )


def _call(inside: str, names: Collection[str]) -> Call | None:
    name, found, arguments = inside.partition("Action Input:")
    try:
        return named_call(name.strip(), read_json(arguments), names) if found else None
    except ValueError:
        return None
