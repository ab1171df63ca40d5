"""Whether a JSON value fits a schema: as much of draft 2020-12 as descriptions of the server use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
# Those that say nothing of a value.
NOTES = {"contentMediaType"}


def same(a: Any, b: Any) -> bool:
    """Whether two values are one, true being no number."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def is_of(value: Any, kind: str) -> bool:
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    return isinstance(value, KINDS[kind])


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether it does.

    Raises:
        AssertionError: the schema has a keyword that isn't known here.
    """
    return all(_holds(keyword, rule, value, schema) for keyword, rule in schema.items())


def _holds(keyword: str, rule: Any, value: Any, schema: Mapping[str, Any]) -> bool:
    is_number = is_of(value, "number")
    match keyword:
        case "type":
            return any(is_of(value, kind) for kind in ([rule] if isinstance(rule, str) else rule))
        case "enum":
            return any(same(value, each) for each in rule)
        case "const":
            return same(value, rule)
        case "anyOf":
            return any(fits(value, each) for each in rule)
        case "minimum":
            return not is_number or value >= rule
        case "maximum":
            return not is_number or value <= rule
        case "exclusiveMinimum":
            return not is_number or value > rule
        case "minLength":
            return not isinstance(value, str) or len(value) >= rule
        case "maxLength":
            return not isinstance(value, str) or len(value) <= rule
        case "pattern":
            return not isinstance(value, str) or re.search(rule, value) is not None
        case "minItems":
            return not isinstance(value, list) or len(value) >= rule
        case "maxItems":
            return not isinstance(value, list) or len(value) <= rule
        case "maxProperties":
            return not isinstance(value, dict) or len(value) <= rule
        case "items":
            return not isinstance(value, list) or all(fits(each, rule) for each in value)
        case "required":
            return not isinstance(value, dict) or all(name in value for name in rule)
        case "properties":
            return not isinstance(value, dict) or all(fits(value[name], rule[name]) for name in rule if name in value)
        case "propertyNames":
            return not isinstance(value, dict) or all(fits(name, rule) for name in value)
        case "additionalProperties":
            others = [] if not isinstance(value, dict) else [n for n in value if n not in schema.get("properties", {})]
            return not others if rule is False else all(fits(value[name], rule) for name in others)
    assert keyword in NOTES, f"what is {keyword}?"
    return True
