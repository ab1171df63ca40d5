"""Conversations as a model reads them: messages, functions and earlier calls, by its template or as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.state import Model
from qwen_aot.runtime.server.tool_formats.base import Function, Offer, ToolFormat
from qwen_aot.runtime.server.tool_formats.choose import choose_format
from qwen_aot.runtime.text.chat_template import ChatTemplate

__all__ = ["Conversation", "make_conversation"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a model is asked.

    Attributes:
        messages: as its template takes them.
        tools: JSON schemas of functions, for a template that takes them; None: there are none.
        begun: how the answer begins; the model goes on behind it.
        tool_format: in which it calls functions; None: it calls none.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: list[dict[str, Any]] | None = None
    begun: str = ""
    tool_format: ToolFormat | None = None

    def continued(self, ids: Sequence[int], model: Model) -> list[int]:
        """The tokens of the messages, and those of `begun` behind them; a control token that it spells is text.

        Where the template begins a thought, `begun` stands behind an empty one.
        """
        tokenizer, thoughts = model.generator.tokenizer, model.generator.chat_encoder.thoughts
        assert tokenizer is not None
        if not self.begun:
            return list(ids)
        behind = list(ids) if thoughts is None else thoughts.closed(ids, tokenizer)
        return [*behind, *tokenizer.encode(self.begun, add_special_tokens=False, allow_special_tokens=False)]


def make_conversation(messages: Sequence[Mapping[str, Any]], offer: Offer | None, model: Model) -> Conversation:
    """Tells a model messages and functions.

    Args:
        messages: as `chat` has read them.
        offer: the functions; None: it isn't told of any, but of earlier calls.
        model: the model.

    Raises:
        ApiError: it can't be told of functions; or see `ToolFormat.tell`.
    """
    template = model.generator.chat_encoder.template
    teaching = choose_format(template, model.tool_format)
    if offer is None:
        has_calls = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if not has_calls or teaching is None or teaching.by_template:
            return Conversation(messages)
        told = teaching.format.tell(messages, None)
        return Conversation(told.messages, begun=told.begun)
    if teaching is None:
        raise _unsupported(template)
    if teaching.by_template:
        return Conversation(messages, [_tool(each) for each in offer.functions], tool_format=teaching.format)
    told = teaching.format.tell(messages, offer)
    return Conversation(told.messages, begun=told.begun, tool_format=teaching.format)


def _unsupported(template: ChatTemplate) -> ApiError:
    takes = "teaches a form of calls that isn't known here" if template.takes_tools else "takes no tools"
    message = (
        f"tools is not supported: this model's chat template {takes}, and the server has no --tool-format; describe "
        "functions in a message instead"
    )
    return ApiError(400, message, code="unsupported_parameter", param="tools")


def _tool(function: Function) -> dict[str, Any]:
    """A function as templates take it: `strict` is the server's business."""
    described = {"description": function.description} if function.description else {}
    return {
        "type": "function",
        "function": {"name": function.name, **described, "parameters": function.parameters},
    }
