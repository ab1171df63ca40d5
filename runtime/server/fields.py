"""Fields of a request's object: each name with a reader that checks its value, and no other name.

A reader takes a JSON value and the name of its place, and returns what it means or raises the refusal.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from qwen_aot.runtime.server.errors import ApiError

__all__ = [
    "Reader",
    "boolean",
    "integer",
    "items",
    "number",
    "only",
    "read_object",
    "refused",
    "text",
    "text_or_texts",
    "wrong",
]

Reader: TypeAlias = Callable[[Any, str], Any]

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

    return read


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

    return read


def boolean(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        wrong(value, where, "true or false")
    return value


def text(*, least: int = 0, most: int | None = None) -> Reader:
    """A text of so many characters."""

    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) < least or (most is not None and len(value) > most):
            length = f" of {least} to {most} characters" if most is not None else " that isn't empty" if least else ""
            wrong(value, where, f"a text{length}")
        return value

    return read


def items(reader: Reader, *, least: int = 0, most: int | None = None) -> Reader:
    """A list."""

    def read(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            length = f" of {least} to {most} entries" if most is not None else " that isn't empty" if least else ""
            wrong(value, where, f"a list{length}")
        return [reader(entry, f"{where}[{index}]") for index, entry in enumerate(value)]

    return read


def text_or_texts(reader: Reader, most: int) -> Reader:
    """A text, or a list of some: a tuple of them."""
    several = items(reader, most=most)

    def read(value: Any, where: str) -> tuple[str, ...]:
        return tuple(several(value, where)) if isinstance(value, list) else (reader(value, where),)

    return read


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

    return read


def refused(remedy: str) -> Reader:
    """A field of the API that isn't supported."""

    def read(value: Any, where: str) -> NoReturn:
        raise ApiError(
            400, f"{where} is not supported by this server: {remedy}", code="unsupported_parameter", param=where
        )

    return read


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
