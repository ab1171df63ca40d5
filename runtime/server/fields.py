"""Fields of a request's object: each name with a reader that checks its value, and no other name.

A reader takes a JSON value and the name of its place, and returns what it means or raises the refusal. It says what it
accepts, so that what the server says of itself (`openapi`) can't lack a field that it reads.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from qwen_aot.runtime.server.errors import ApiError

__all__ = [
    "Reader",
    "Schema",
    "any_of",
    "boolean",
    "integer",
    "items",
    "number",
    "object_of",
    "object_schema",
    "only",
    "read_object",
    "refused",
    "text",
    "text_or_texts",
    "wrong",
]

Schema: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reader:
    """A kind of value: how one is read, and what is said of it in the server's description.

    Attributes:
        read: what a value stands for; it is refused with its place.
        schema: a JSON schema of what is accepted (draft 2020-12); None: nothing is.
    """

    read: Callable[[Any, str], Any]
    schema: Schema | None

    def __call__(self, value: Any, where: str) -> Any:
        """Reads a value.

        Raises:
            ApiError: it isn't of this kind.
        """
        return self.read(value, where)


MAX_SHOWN = 60  # characters of a wrong value in a message


def read_object(
    document: Any, readers: Mapping[str, Reader], *, where: str = "", required: Sequence[str] = ()
) -> dict[str, Any]:
    """The values of an object; null is the same as not given.

    Args:
        document: parsed JSON.
        readers: of every name that may stand in it.
        where: the object's own name; "" is the body.
        required: names that must be there.

    Raises:
        ApiError: it isn't an object, a name is unknown (near ones are named) or missing, or a value is wrong.
    """
    if not isinstance(document, dict):
        wrong(document, where, "an object")
    prefix = f"{where}." if where else ""
    for name in document:
        if name not in readers:
            near = difflib.get_close_matches(name[:100], readers, n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else f"accepted: {', '.join(sorted(readers))}"
            place = prefix + name[:MAX_SHOWN]
            raise ApiError(400, f"there is no field {place!r}: {hint}", code="unknown_parameter", param=place)
    for name in required:
        if document.get(name) is None:
            place = prefix + name
            message = f"the field {place!r} is missing"
            raise ApiError(400, message, code="missing_required_parameter", param=place)
    return {name: readers[name](value, prefix + name) for name, value in document.items() if value is not None}


def object_schema(readers: Mapping[str, Reader], required: Sequence[str] = ()) -> Schema:
    """What `read_object` accepts: a field that isn't required may be null; one that is always refused isn't named."""
    properties = {}
    for name, reader in sorted(readers.items()):
        if reader.schema is not None:
            schema = reader.schema
            properties[name] = schema if name in required else any_of(schema, {"type": "null"})
    made: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return made | {"required": list(required)} if required else made


def object_of(readers: Mapping[str, Reader], required: Sequence[str] = ()) -> Reader:
    """An object; see `read_object`."""
    return Reader(
        lambda value, where: read_object(value, readers, where=where, required=required),
        object_schema(readers, required),
    )


def any_of(*schemas: Schema) -> Schema:
    """Of one of several kinds."""
    return {"anyOf": list(schemas)}


def wrong(value: Any, where: str, accepted: str) -> NoReturn:
    """Refuses a value."""
    shown = _shown(value)
    subject = f"{where} is" if where else "the body is"
    raise ApiError(400, f"{subject} {shown}; accepted: {accepted}", code="invalid_value", param=where or None)


def integer(least: int, most: int) -> Reader:
    """A whole number."""

    def read(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            wrong(value, where, f"a whole number of {least} to {most}")
        return value

    return Reader(read, {"type": "integer", "minimum": least, "maximum": most})


def number(least: float, most: float, *, above: bool = False, zero: bool = False) -> Reader:
    """A finite number.

    Args:
        least: the smallest.
        most: the largest.
        above: `least` itself isn't accepted.
        zero: 0 is, besides.
    """

    def read(value: Any, where: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and zero and value == 0:
            return 0.0
        if not is_number or not least <= value <= most or (above and value == least):
            wrong(
                value, where, f"{'0, or ' if zero else ''}a number {'above' if above else 'of'} {least:g} to {most:g}"
            )
        return float(value)

    schema: Schema = {"type": "number", "exclusiveMinimum" if above else "minimum": least, "maximum": most}
    return Reader(read, any_of({"const": 0}, schema) if zero else schema)


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        wrong(value, where, "true or false")
    return value


boolean = Reader(_boolean, {"type": "boolean"})


def text(*, least: int = 0, most: int | None = None) -> Reader:
    """A text of so many characters."""

    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) < least or (most is not None and len(value) > most):
            length = f" of {least} to {most} characters" if most is not None else " that isn't empty" if least else ""
            wrong(value, where, f"a text{length}")
        return value

    return Reader(read, _sized("string", "Length", least, most))


def items(reader: Reader, *, least: int = 0, most: int | None = None) -> Reader:
    """A list."""

    def read(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            length = f" of {least} to {most} entries" if most is not None else " that isn't empty" if least else ""
            wrong(value, where, f"a list{length}")
        return [reader(entry, f"{where}[{index}]") for index, entry in enumerate(value)]

    return Reader(read, {**_sized("array", "Items", least, most), "items": reader.schema})


def _sized(kind: str, unit: str, least: int, most: int | None) -> dict[str, Any]:
    return {"type": kind} | ({f"min{unit}": least} if least else {}) | ({} if most is None else {f"max{unit}": most})


def text_or_texts(reader: Reader, most: int) -> Reader:
    """A text, or a list of some: a tuple of them."""
    several = items(reader, most=most)

    def read(value: Any, where: str) -> tuple[str, ...]:
        return tuple(several(value, where)) if isinstance(value, list) else (reader(value, where),)

    assert reader.schema is not None and several.schema is not None
    return Reader(read, any_of(reader.schema, several.schema))


def only(*values: Any) -> Reader:
    """One of these values: what asks for nothing that isn't there."""

    def read(value: Any, where: str) -> Any:
        for accepted in values:
            if type(value) is type(accepted) and value == accepted:
                return value
        shown = " or ".join(_shown(accepted) for accepted in values)
        raise ApiError(
            400,
            f"{where} is {_shown(value)}, which this server doesn't support; accepted: {shown}",
            code="unsupported_value",
            param=where,
        )

    return Reader(read, {"enum": list(values)})


def refused(remedy: str) -> Reader:
    """A field of the API that isn't supported."""

    def read(value: Any, where: str) -> NoReturn:
        raise ApiError(
            400, f"{where} is not supported by this server: {remedy}", code="unsupported_parameter", param=where
        )

    return Reader(read, None)


def _shown(value: Any) -> str:
    """A value for a message; a long one costs nothing."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)} fields"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value) if len(value) <= MAX_SHOWN else f"{value[: MAX_SHOWN - 3]!r}..."
    return repr(value)
