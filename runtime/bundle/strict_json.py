"""Strict JSON into frozen dataclasses: no duplicate, unknown or missing key, no silent conversion."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from qwen_aot.errors import BundleError

__all__ = ["parse_dataclass", "parse_object", "require_keys"]

T = TypeVar("T")

_MAX_DEPTH = 200  # objects and arrays in each other, the outermost included: the C reader has no more room
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # of UTF-16, as an escape; whether the other half follows isn't seen


def parse_object(text: str, where: str, *, is_from_checkpoint: bool = False) -> dict[str, Any]:
    """Parses a JSON object.

    Refused are duplicate keys, NaN, Infinity, integers beyond 64 bits, halves of characters, and more than 200 objects
    and arrays in each other.

    Args:
        text: the document.
        where: what to call the document in messages.
        is_from_checkpoint: not of our format: integers may be of any size, as transformers writes 10^30 for "no limit".

    Raises:
        BundleError: the text isn't one JSON object.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise BundleError(f"{where} has the key {key!r} twice; a key may stand once in an object")
            result[key] = value
        return result

    def constant(literal: str) -> None:
        raise BundleError(f"{where} holds {literal}, which is not JSON")

    def integer(literal: str) -> int:
        if is_from_checkpoint and len(literal) <= 4000:  # Python converts up to 4300 digits
            return int(literal)
        # The length first: Python refuses to convert thousands of digits with an error of its own.
        if len(literal) > 20 or not -(2**63) <= (value := int(literal)) < 2**63:
            raise BundleError(f"{where} holds the number {literal[:24]}...; accepted: integers of 64 bits")
        return value

    try:
        document = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_int=integer)
        if _HALF_A_PAIR.search(text):
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise BundleError(
            f"{where} holds {half}, half of a character; accepted: pairs of them, \\ud83d\\ude00 for example"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{where} is not JSON ({error}): it is damaged or was not written to its end") from error
    if not isinstance(document, dict):
        raise BundleError(f"{where} holds a {type(document).__name__}; accepted: a JSON object")
    _require_depth(document, where)
    return document


def _require_depth(document: dict[str, Any], where: str) -> None:
    level: list[dict[str, Any] | list[Any]] = [document]
    for _ in range(_MAX_DEPTH):
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for values in children for child in values if isinstance(child, dict | list)]
        if not level:
            return
    raise BundleError(f"{where} is nested deeper than {_MAX_DEPTH}; accepted: at most so deep")


def require_keys(
    document: Mapping[str, Any], names: Iterable[str], where: str, *, optional: Iterable[str] = ()
) -> None:
    """An object's keys are exactly these, and any of the optional ones.

    Raises:
        BundleError: names those that are unknown or missing.
    """
    accepted, extra = list(names), list(optional)
    unknown = sorted(set(document) - {*accepted, *extra})
    missing = [name for name in accepted if name not in document]
    if unknown or missing:
        problem = f"unknown keys {unknown}" if unknown else f"no keys {missing}"
        raise BundleError(f"{where} has {problem}; accepted: exactly {accepted}{_and_optional(extra)}")


def parse_dataclass(cls: type[T], document: Mapping[str, Any], where: str) -> T:
    """Makes a dataclass from a JSON object whose keys are exactly its fields; those with a default may be absent.

    Fields may be str, int, bool, float, another such dataclass, `X | None`, `tuple[X, ...]` and
    `Mapping[str, X]`.

    Raises:
        BundleError: names the key, the value found and what is accepted.
    """
    hints = _type_hints(cls)  # type: ignore[arg-type]  # a class is hashable
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    optional = [field.name for field in fields if field.default is not dataclasses.MISSING]
    required = [field.name for field in fields if field.name not in optional]
    require_keys(document, required, where, optional=optional)
    given = [field.name for field in fields if field.name in document]
    values = {name: _parse(hints[name], document[name], f"{where}: {name}") for name in given}
    try:
        return cls(**values)
    except BundleError as error:
        raise BundleError(f"{where}: {error}") from error


def _and_optional(names: list[str]) -> str:
    return f", and {names} where they are wanted" if names else ""


@functools.cache
def _type_hints(cls: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields. Python compiles each anew when asked: 20 ms for a manifest's."""
    return typing.get_type_hints(cls)


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for argument in arguments:
            if type(value) is argument:  # bool is not int here
                return value
            if _is_object(argument) and isinstance(value, dict):
                return _parse(argument, value, where)
    elif origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is Mapping and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return parse_dataclass(typing.cast(type[Any], hint), value, where)
    elif origin is None and type(value) is hint:
        return value
    raise BundleError(f"{where} is {value!r}; accepted: {_describe(hint)}")


def _is_object(hint: Any) -> bool:
    """Whether a JSON object stands for this type."""
    return typing.get_origin(hint) is Mapping or dataclasses.is_dataclass(hint)


def _describe(hint: Any) -> str:
    """A JSON reader's words for a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    if _is_object(hint):
        return "an object"
    return {int: "an integer", str: "a string", bool: "true or false", types.NoneType: "null"}[hint]
