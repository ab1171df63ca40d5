"""Fields of a chat that are about functions: those that are offered, the choice among them, and earlier calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.strict_json import parse_object
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.fields import Reader, items, only, read_object, text, wrong
from qwen_aot.runtime.server.state import Model
from qwen_aot.runtime.server.tool_formats.base import ToolFormat
from qwen_aot.runtime.server.tool_formats.choose import choose_format

__all__ = ["TOOL_CALLS", "TOOL_FIELDS", "offered_tools", "tool_format"]

MAX_TOOLS = 128  # as OpenAI's API
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        wrong(value, where, "1 to 64 letters, digits, _ and -")
    return value


def _schema(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        wrong(value, where, "a JSON schema, which is an object")
    return value


def _arguments(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, str):
        wrong(value, where, "a JSON object, as text")
    try:
        return parse_object(value, where)
    except BundleError as error:
        raise ApiError(400, str(error), code="invalid_value", param=where) from None


_FUNCTION: Mapping[str, Reader] = {
    "name": _name,
    "description": text(),
    "parameters": _schema,
    "strict": only(False),
}


def _tool(value: Any, where: str) -> dict[str, Any]:
    def function(inner: Any, place: str) -> dict[str, Any]:
        return read_object(inner, _FUNCTION, where=place, required=("name",))

    readers: Mapping[str, Reader] = {"type": only("function"), "function": function}
    return read_object(value, readers, where=where, required=("type", "function"))


def _call(value: Any, where: str) -> dict[str, Any]:
    def function(inner: Any, place: str) -> dict[str, Any]:
        readers: Mapping[str, Reader] = {"name": _name, "arguments": _arguments}
        return read_object(inner, readers, where=place, required=("name", "arguments"))

    readers: Mapping[str, Reader] = {
        "id": text(most=256),
        "index": lambda inner, place: None,  # what streamed pieces have besides
        "type": only("function"),
        "function": function,
    }
    call = read_object(value, readers, where=where, required=("id", "type", "function"))
    call.pop("index", None)
    return call


TOOL_CALLS = items(_call, least=1, most=MAX_TOOLS)
TOOL_FIELDS: Mapping[str, Reader] = {
    "parallel_tool_calls": only(True),
    "tool_choice": only("none", "auto"),
    "tools": items(_tool, least=1, most=MAX_TOOLS),
}


def offered_tools(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The functions that a body offers to the model; none where its choice is `none`.

    Raises:
        ApiError: the choice of a tool where there is none, or two tools of one name.
    """
    tools: list[dict[str, Any]] = fields.get("tools", [])
    for name in ("tool_choice", "parallel_tool_calls"):
        if name in fields and not tools:
            raise ApiError(400, f"{name} goes with tools", code="invalid_value", param=name)
    names = [tool["function"]["name"] for tool in tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            wrong(name, f"tools[{number}].function.name", "each name once")
    return [] if fields.get("tool_choice") == "none" else tools


def tool_format(model: Model) -> ToolFormat:
    """How the model writes calls.

    Raises:
        ApiError: its template takes no tools, or teaches a format that isn't known.
    """
    template = model.generator.chat_encoder.template
    if not template.takes_tools:
        why = "this model's chat template takes no tools"
    elif (found := choose_format(template.literals)) is not None:
        return found
    else:
        why = "this model's chat template teaches a form of calls that isn't known here"
    message = f"tools is not supported: {why}; describe functions in a message instead"
    raise ApiError(400, message, code="unsupported_parameter", param="tools")
