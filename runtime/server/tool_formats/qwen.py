"""The format ✿FUNCTION✿, ✿ARGS✿, ✿RESULT✿, ✿RETURN✿, of Qwen-Agent's `qwen` prompt, on which Qwen1.5 was aligned.

Its wording is what models were trained with. A turn is one message of the assistant, in which the results stand.

Source: https://github.com/QwenLM/Qwen-Agent/blob/main/qwen_agent/llm/fncall_prompts/qwen_fncall_prompt.py;
that Qwen1.5 was aligned on it: https://github.com/QwenLM/Qwen-Agent/issues/104
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qwen_aot.runtime.server.tool_formats.base import Call, CallSyntax, Function, Offer, Piece, Told
from qwen_aot.runtime.server.tool_formats.marked_reader import MarkedReader, named_call, read_json
from qwen_aot.runtime.server.tool_formats.turns import Turn, turns_of, with_system

__all__ = ["Qwen"]

_FUNCTION, _ARGUMENTS, _RESULT, _RETURN = "✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿", "✿RETURN✿"
_RETURNED = f"\n{_RETURN}: "

_TOOLS = """# Tools

## You have access to the following tools:

{functions}

"""
_ONE = f"""## When you need to call a tool, please insert the following command in your reply, which can be called \
zero or multiple times according to your needs:

{_FUNCTION}: The tool to use, should be one of [{{names}}]
{_ARGUMENTS}: The input of the tool
{_RESULT}: Tool results
{_RETURN}: Reply based on tool results. Images need to be rendered as ![](url)"""
_SEVERAL = f"""## Insert the following command in your reply when you need to call N tools in parallel:

{_FUNCTION}: The name of tool 1, should be one of [{{names}}]
{_ARGUMENTS}: The input of tool 1
{_FUNCTION}: The name of tool 2
{_ARGUMENTS}: The input of tool 2
...
{_FUNCTION}: The name of tool N
{_ARGUMENTS}: The input of tool N
{_RESULT}: The result of tool 1
{_RESULT}: The result of tool 2
...
{_RESULT}: The result of tool N
{_RETURN}: Reply based on tool results. Images need to be rendered as ![](url)"""


class Qwen:
    """See `ToolFormat`."""

    name = "qwen"
    stops = (_RESULT, _RETURN)
    syntax = CallSyntax(
        mark=f"{_FUNCTION}:",
        before_arguments=f" {{name}}\n{_ARGUMENTS}: ",
        between="\n",
        end=f"\n{_RESULT}",
    )

    def fits(self, template_literals: Collection[str]) -> bool:
        """See `ToolFormat`."""
        return any(_FUNCTION in text for text in template_literals)

    def tell(self, messages: Sequence[Mapping[str, Any]], offer: Offer | None) -> Told:
        """See `ToolFormat`. Several calls at once are told of only where a request asks for them, as in Qwen-Agent."""
        turns = turns_of(messages)
        begun, last = "", turns[-1]
        if isinstance(last, Turn) and last.is_open:
            begun = _written(last)
            turns.pop()
            if offer is not None:  # ": " may be one token with what follows; its reader leaves it out
                begun = begun + "\n" if offer.is_required else begun.removesuffix(": ")
        told = [{"role": "assistant", "content": _written(each)} if isinstance(each, Turn) else each for each in turns]
        if offer is None:
            return Told(told, begun)
        text = _TOOLS + (_SEVERAL if offer.may_repeat else _ONE)
        functions = "\n\n".join(map(_described, offer.functions))
        return Told(with_system(told, text.format(functions=functions, names=",".join(offer.names))), begun)

    def reader(self, names: Collection[str], *, is_continued: bool) -> _Reader:
        """See `ToolFormat`."""
        return _Reader(names, is_continued)


class _Reader:
    """See `ToolReader`. The colon behind a ✿RETURN✿ that was begun is the format's."""

    def __init__(self, names: Collection[str], is_continued: bool) -> None:
        self._reader = MarkedReader(Qwen.syntax.mark, "", lambda inside: _call(inside, names))
        self._colon = ": " if is_continued else ""  # what of it may still come

    def push(self, text: str) -> list[Piece]:
        """See `ToolReader`."""
        while self._colon and text:
            if text[0] != self._colon[0]:
                self._colon = ""
                break
            text, self._colon = text[1:], self._colon[1:]
        return self._reader.push(text)

    def flush(self) -> list[Piece]:
        """See `ToolReader`."""
        return self._reader.flush()


def _written(turn: Turn) -> str:
    text = ""
    for step in turn.steps:
        text += step.content
        for call in step.calls:
            text += "\n" if text else ""
            text += f"{_FUNCTION}: {call.name}\n{_ARGUMENTS}: {call.arguments}"
        for result in step.results:
            if result is not None:
                text = f"{text.removesuffix(_RETURNED)}\n{_RESULT}: {result}{_RETURNED}"
    return text


def _described(function: Function) -> str:
    """A function, as the prompt has it."""
    return (
        f"### {function.name}\n\n{function.name}: {function.description} Parameters: {function.parameters_text} "
        "Format the arguments as a JSON object."
    )


def _call(inside: str, names: Collection[str]) -> Call | None:
    name, found, arguments = inside.partition(f"{_ARGUMENTS}:")
    try:
        return named_call(name.strip(), read_json(arguments), names) if found else None
    except ValueError:
        return None
