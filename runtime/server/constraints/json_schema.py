"""JSON schemas that clients give: what of them is accepted, looked at before anything is compiled.

A keyword that would change nothing is refused: a client would take its answer for held to it.

Source: https://json-schema.org/draft/2020-12; keywords: llguidance's docs/json_schema.md.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.server.fields import wrong

__all__ = ["MAX_SCHEMA_BYTES", "check_schema", "check_size"]

MAX_SCHEMA_BYTES = 64 << 10  # of all schemas of a request, as JSON
MAX_DEPTH = 32  # of objects and lists in one another

# A multiple is told by an automaton with a state for each remainder: 0.01 has 100 of them, of 1, and 1000 takes 20 ms.
MAX_REMAINDERS = 1000
MAX_REMAINDERS_IN_ALL = 5000
MAX_MULTIPLE = 10**9

# Where a keyword's value has schemas: it is one, a list of them, or an object of them.
_SCHEMA = frozenset({"additionalProperties", "items"})
_SCHEMA_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SCHEMA_OBJECTS = frozenset({"$defs", "definitions", "patternProperties", "properties"})

_HELD = frozenset(
    {
        "$ref",
        "const",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "pattern",
        "required",
        "type",
    }
)
# What says nothing about which values are valid. OpenAPI's discriminator, which Pydantic writes for a union that one
# field tells, only says where to look: which schema of oneOf a value is their own `const`s decide.
_NOTES = frozenset(
    {
        "$anchor",
        "$comment",
        "$id",
        "$schema",
        "default",
        "deprecated",
        "description",
        "discriminator",
        "example",
        "examples",
        "externalDocs",
        "readOnly",
        "title",
        "writeOnly",
        "xml",
    }
)
_KEYWORDS = _SCHEMA | _SCHEMA_LISTS | _SCHEMA_OBJECTS | _HELD | _NOTES


def check_size(size: int, where: str) -> None:
    """Refuses schemas that are too long together.

    Args:
        size: of their JSON, in bytes.
        where: the field that they came in.

    Raises:
        ApiError: 400.
    """
    if size > MAX_SCHEMA_BYTES:
        message = f"{where} has {size} bytes of JSON schemas; accepted: at most {MAX_SCHEMA_BYTES}"
        raise ApiError(400, message, code="invalid_value", param=where)


def check_schema(schema: Any, where: str) -> str:
    """Checks one schema.

    Args:
        schema: parsed JSON: an object, true or false.
        where: its place in the body.

    Returns:
        It as JSON.

    Raises:
        ApiError: it is too long or too deep, has a keyword that isn't known here, or refers to another document.
    """
    _check_depth(schema, where)
    text = json.dumps(schema)
    check_size(len(text), where)
    remainders = 0
    for each, place in _subschemas(schema, where):
        if isinstance(each, bool):
            continue
        if not isinstance(each, dict):
            wrong(each, place, "a JSON schema: an object, true or false")
        _check_keywords(each, place)
        if "multipleOf" in each:
            remainders += _remainders(each["multipleOf"], f"{place}.multipleOf")
            if remainders > MAX_REMAINDERS_IN_ALL:
                raise _unsupported(f"{place}.multipleOf", "there are too many of it in this schema; leave some out")
    return text


def _check_depth(value: Any, where: str) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    message = (
        f"{where} is nested more than {MAX_DEPTH} deep; accepted: at most {MAX_DEPTH} objects and lists in one another"
    )
    raise ApiError(400, message, code="invalid_value", param=where)


def _subschemas(schema: Any, where: str) -> Iterator[tuple[Any, str]]:
    """Every schema in a schema, with its place."""
    yield schema, where
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        place = f"{where}.{name}"
        if name in _SCHEMA:
            yield from _subschemas(value, place)
        elif name in _SCHEMA_LISTS and isinstance(value, list):
            for number, each in enumerate(value):
                yield from _subschemas(each, f"{place}[{number}]")
        elif name in _SCHEMA_OBJECTS and isinstance(value, dict):
            for key, each in value.items():
                yield from _subschemas(each, f"{place}.{key}")


def _check_keywords(schema: Mapping[str, Any], where: str) -> None:
    for name in schema:
        if name not in _KEYWORDS:
            near = difflib.get_close_matches(name[:100], _KEYWORDS - _NOTES, n=2, cutoff=0.7)
            remedy = f"did you mean {' or '.join(near)}?" if near else "leave it out, or say it in a message"
            raise _unsupported(f"{where}.{name}", f"answers can't be held to this keyword; {remedy}")
    if "discriminator" in schema:
        _check_discriminator(schema, f"{where}.discriminator")
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        wrong(reference, f"{where}.$ref", "a place in the same schema, such as #/$defs/name; nothing is ever fetched")


def _check_discriminator(schema: Mapping[str, Any], where: str) -> None:
    """It is left alone, but what stands there has to be one: a name beside schemas to choose from."""
    value = schema["discriminator"]
    mapping = value.get("mapping", {}) if isinstance(value, dict) else None
    is_one = isinstance(mapping, dict) and all(isinstance(each, str) for each in mapping.values())
    if not is_one or not isinstance(value.get("propertyName"), str) or set(value) - {"mapping", "propertyName"}:
        wrong(value, where, "an object with a propertyName and, if you like, a mapping of values to schemas' names")
    if not {"anyOf", "oneOf"} & set(schema):
        raise _unsupported(where, "it says which schema of oneOf or anyOf a value is, and there is neither beside it")


def _remainders(value: Any, where: str) -> int:
    """How many remainders a multiple has, in units of its last digit."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < MAX_MULTIPLE:
        wrong(value, where, f"a number above 0 and below {MAX_MULTIPLE}")
    number = Decimal(str(value)).normalize()
    _, digits, exponent = number.as_tuple()
    assert isinstance(exponent, int)
    count: int = int("".join(map(str, digits))) * 10 ** abs(exponent)
    if count > MAX_REMAINDERS:
        wrong(value, where, f"such as 5 or 0.01: at most {MAX_REMAINDERS} remainders, in units of its last digit")
    return count


def _unsupported(where: str, why: str) -> ApiError:
    return ApiError(400, f"{where} is not supported: {why}", code="unsupported_value", param=where)
