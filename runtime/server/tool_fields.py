"""Fields of a chat that are about functions: those that are offered, the choice among them, and earlier calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.strict_json import parse_object
from qwen_aot.runtime.server.constraints.json_schema import check_schema, check_size
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.fields import Reader, any_of, boolean, items, object_of, only, text, wrong
from qwen_aot.runtime.server.tool_formats.base import Function, Offer

__all__ = ["TOOL_CALLS", "TOOL_FIELDS", "read_offer"]

MAX_TOOLS = 128  # as OpenAI's API
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


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


_NAMED = Reader(_name, {"type": "string", "pattern": f"^{_NAME.pattern}$"})
_TOOL = object_of(
    {
        "type": only("function"),
        "function": object_of(
            {
                "name": _NAMED,
                "description": text(),
                "parameters": Reader(_schema, {"type": "object"}),
                "strict": boolean,
            },
            ("name",),
        ),
    },
    ("type", "function"),
)
_CALL = object_of(
    {
        "id": text(most=256),
        "index": Reader(lambda value, where: None, {}),  # what streamed pieces have besides
        "type": only("function"),
        "function": object_of(
            {
                "name": _NAMED,
                "arguments": Reader(_arguments, {"type": "string", "contentMediaType": "application/json"}),
            },
            ("name", "arguments"),
        ),
    },
    ("id", "type", "function"),
)


def _call(value: Any, where: str) -> dict[str, Any]:
    call: dict[str, Any] = _CALL(value, where)
    call.pop("index", None)
    return call


@dataclass(frozen=True, slots=True)
class _Choice:
    """`tool_choice`: a word, or the function to be called."""

    kind: str
    named: str | None = None


_CHOSEN_KIND = only("none", "auto", "required")
_CHOSEN_FUNCTION = object_of(
    {"type": only("function"), "function": object_of({"name": _NAMED}, ("name",))}, ("type", "function")
)


def _choice(value: Any, where: str) -> _Choice:
    if not isinstance(value, dict):
        kind: str = _CHOSEN_KIND(value, where)
        return _Choice(kind)
    only("function")(value.get("type"), f"{where}.type")  # looked at first: it says which fields belong to it
    return _Choice("required", _CHOSEN_FUNCTION(value, where)["function"]["name"])


assert _CHOSEN_KIND.schema is not None and _CHOSEN_FUNCTION.schema is not None
TOOL_CALLS = items(Reader(_call, _CALL.schema), least=1, most=MAX_TOOLS)
TOOL_FIELDS: Mapping[str, Reader] = {
    "parallel_tool_calls": boolean,
    "tool_choice": Reader(_choice, any_of(_CHOSEN_KIND.schema, _CHOSEN_FUNCTION.schema)),
    "tools": items(_TOOL, least=1, most=MAX_TOOLS),
}


def read_offer(fields: Mapping[str, Any]) -> Offer | None:
    """The functions that a body offers to the model; None: none, or its choice is `none`.

    Args:
        fields: read by `TOOL_FIELDS`.

    Raises:
        ApiError: the choice of a tool where there is none, two tools of one name, or a schema that calls are to be held
            to and can't.
    """
    tools: list[dict[str, Any]] = fields.get("tools", [])
    for name in ("tool_choice", "parallel_tool_calls"):
        if name in fields and not tools:
            raise ApiError(400, f"{name} goes with tools", code="invalid_value", param=name)
    choice = fields.get("tool_choice", _Choice("auto"))
    functions = tuple(_function(tool["function"], f"tools[{number}].function") for number, tool in enumerate(tools))
    offer = Offer(functions, choice.kind == "required", choice.named, fields.get("parallel_tool_calls"))
    for number, name in enumerate(offer.names):
        if name in offer.names[:number]:
            wrong(name, f"tools[{number}].function.name", "each name once")
    if choice.named is not None and choice.named not in offer.names:
        wrong(choice.named, "tool_choice.function.name", "the name of one of tools")
    if not functions or choice.kind == "none":
        return None
    held = [function for function in offer.callable if offer.is_required or function.is_strict]
    check_size(sum(len(check_schema(function.parameters, function.where)) for function in held), "tools")
    return offer


def _function(given: Mapping[str, Any], where: str) -> Function:
    return Function(
        name=given["name"],
        description=given.get("description", ""),
        parameters=given.get("parameters", _NO_PARAMETERS),
        is_strict=given.get("strict", False),
        where=f"{where}.parameters",
    )
