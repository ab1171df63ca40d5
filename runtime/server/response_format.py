"""`response_format`: JSON in answers, any object or what a schema describes.

Source: https://platform.openai.com/docs/api-reference/chat/create#chat_create-response_format
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwen_aot.runtime.server.constraints.grammar import ANY_OBJECT, HeldJson
from qwen_aot.runtime.server.constraints.json_schema import check_schema
from qwen_aot.runtime.server.fields import Reader, any_of, boolean, object_schema, only, read_object, text, wrong

__all__ = ["RESPONSE_FORMAT"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TYPES = ("text", "json_object", "json_schema")


def _response_format(value: Any, where: str) -> HeldJson | None:
    """What an answer's content is held to; None: nothing.

    Raises:
        ApiError: it isn't one of the formats, or its schema can't be taken.
    """
    if isinstance(value, dict):  # looked at first: it says which fields belong to it
        only(*_TYPES)(value.get("type"), f"{where}.type")
    kind = value.get("type") if isinstance(value, dict) else None
    readers: dict[str, Reader] = {"type": only(*_TYPES)}
    if kind == "json_schema":
        readers["json_schema"] = _NAMED_SCHEMA
    found = read_object(value, readers, where=where, required=tuple(readers))
    if kind == "text":
        return None
    held: HeldJson = found["json_schema"] if kind == "json_schema" else HeldJson(ANY_OBJECT, where)
    return held


def _json_schema(value: Any, where: str) -> HeldJson:
    held: HeldJson = read_object(value, _JSON_SCHEMA, where=where, required=("name", "schema"))["schema"]
    return held


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        wrong(value, where, "1 to 64 letters, digits, _ and -")
    return value


def _schema(value: Any, where: str) -> HeldJson:
    if not isinstance(value, dict):
        wrong(value, where, "a JSON schema, which is an object")
    check_schema(value, where)
    return HeldJson(value, where)


_JSON_SCHEMA: Mapping[str, Reader] = {
    "name": Reader(_name, {"type": "string", "pattern": f"^{_NAME.pattern}$"}),
    "description": text(),
    "schema": Reader(_schema, {"type": "object"}),
    "strict": boolean,  # answers are held to the schema in any case
}
_NAMED_SCHEMA = Reader(_json_schema, object_schema(_JSON_SCHEMA, ("name", "schema")))
RESPONSE_FORMAT = Reader(
    _response_format,
    any_of(
        object_schema({"type": only("text", "json_object")}, ("type",)),
        object_schema({"type": only("json_schema"), "json_schema": _NAMED_SCHEMA}, ("type", "json_schema")),
    ),
)
