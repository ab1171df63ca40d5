"""The format `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, of Qwen2.5's templates and of Hermes.

Templates that take no tools get it as text: Qwen-Agent's `nous` prompt, whose wording is what models were trained with.

Source: https://qwen.readthedocs.io/en/latest/framework/function_call.html,
https://github.com/NousResearch/Hermes-Function-Calling,
https://github.com/QwenLM/Qwen-Agent/blob/main/qwen_agent/llm/fncall_prompts/nous_fncall_prompt.py
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qwen_aot.runtime.server.tool_formats.base import Call, CallSyntax, Function, Offer, Told
from qwen_aot.runtime.server.tool_formats.marked_reader import MarkedReader, named_call, read_json
from qwen_aot.runtime.server.tool_formats.turns import text_of, with_system

__all__ = ["Hermes"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"

_SYSTEM = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{functions}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class Hermes:
    """See `ToolFormat`."""

    name = "hermes"
    stops = ()
    syntax = CallSyntax(
        mark=_OPEN,
        before_arguments='\n{{"name": "{name}", "arguments": ',
        after=f"}}\n{_CLOSE}",
        between="\n",
    )

    def fits(self, template_literals: Collection[str]) -> bool:
        """See `ToolFormat`."""
        return any(_OPEN in text for text in template_literals)

    def tell(self, messages: Sequence[Mapping[str, Any]], offer: Offer | None) -> Told:
        """See `ToolFormat`. A result is a message of the user."""
        told: list[dict[str, Any]] = []
        for message in messages:
            role, content = message["role"], text_of(message["content"])
            if role == "tool":
                role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
                if told and told[-1]["role"] == "user":
                    told[-1] = {**told[-1], "content": f"{told[-1]['content']}\n{content}"}
                    continue
            calls = [_written(call["function"]) for call in message.get("tool_calls", [])]
            others = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
            told.append({**others, "role": role, "content": "\n".join([*([content] if content else []), *calls])})
        if offer is None:
            return Told(told)
        functions = [json.dumps(_signature(function), ensure_ascii=False) for function in offer.functions]
        return Told(with_system(told, _SYSTEM.format(functions="\n".join(functions))))

    def reader(self, names: Collection[str], *, is_continued: bool) -> MarkedReader:
        """See `ToolFormat`."""
        return MarkedReader(_OPEN, _CLOSE, lambda inside: _call(inside, names))


def _signature(function: Function) -> dict[str, Any]:
    signature = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": "function", "function": signature}


def _written(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{_OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{_CLOSE}"


def _call(inside: str, names: Collection[str]) -> Call | None:
    try:
        document = read_json(inside)
    except ValueError:
        return None
    return (
        named_call(document.get("name"), document.get("arguments", {}), names) if isinstance(document, dict) else None
    )
