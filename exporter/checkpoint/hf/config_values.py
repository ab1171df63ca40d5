"""Values of a config.json, each of the type that it must have: what every architecture's reader is written with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import CheckpointError

_MISSING = object()


def count(raw: Mapping[str, Any], key: str, default: object = _MISSING) -> int:
    """The whole number under a key.

    Raises:
        CheckpointError: it is missing without a default, or something else.
    """
    value = raw.get(key, default)
    if value is _MISSING:
        raise CheckpointError(f"{key} is missing; accepted: a whole number")
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{key} is {value!r}; accepted: a whole number")
    return value


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The number under a key; null is as good as missing.

    Raises:
        CheckpointError: it is missing without a default, something else, or beyond float64.
    """
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{key} is missing; accepted: a number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{key} is {value!r}; accepted: a number")
    try:
        return float(value)
    except OverflowError:
        raise CheckpointError(f"{key} is a number of {len(str(value))} digits; accepted: a float64") from None


def flag(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    """The truth value under a key; null is as good as missing.

    Raises:
        CheckpointError: it is something else.
    """
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise CheckpointError(f"{key} is {value!r}; accepted: true or false")
    return value
