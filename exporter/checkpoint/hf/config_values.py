"""Values of a config.json, each of the type that it must have: what every architecture's reader is written with."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.config import DTYPES

logger = logging.getLogger(__name__)

_MISSING = object()
_NO_TOKEN = -1  # how many files say that there is none


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


def dtype_name(raw: Mapping[str, Any]) -> str:
    """What the weights were saved in; only a hint, since each tensor says its own.

    Raises:
        CheckpointError: it is none that weights may have.
    """
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"torch_dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
    return name


def token_id(raw: Mapping[str, Any], generation: Mapping[str, Any], key: str) -> int | None:
    """An id of config.json, or else of generation_config.json; None: neither names one.

    Raises:
        CheckpointError: it is something else than a whole number.
    """
    for source in (raw, generation):
        if source.get(key) not in (None, _NO_TOKEN):
            return count(source, key)
    return None


def bos_token_id(raw: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int) -> int | None:
    """One that the model has: a model whose vocabulary was cut often keeps the id of the whole one's.

    Raises:
        CheckpointError: it is something else than a whole number.
    """
    found = token_id(raw, generation, "bos_token_id")
    if found is None or 0 <= found < vocab_size:
        return found
    logger.warning("bos_token_id is %d, beyond the vocabulary of %d: left out", found, vocab_size)
    return None


def eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Stop ids of both files, each once: a chat model's generation_config.json names more of them.

    Raises:
        CheckpointError: one is something else than a whole number.
    """
    ids: dict[int, None] = {}
    for source in (generation, raw):
        value = source.get("eos_token_id")
        for each in value if isinstance(value, list) else [value]:
            if each not in (None, _NO_TOKEN):
                ids[count({"eos_token_id": each}, "eos_token_id")] = None
    return tuple(ids)


def require_accepted(raw: Mapping[str, Any], accepted: Mapping[str, tuple[object, ...]]) -> None:
    """Refuses values under which the computation would be another.

    Args:
        raw: the parsed config.json.
        accepted: the values that a key may have; None: null.

    Raises:
        CheckpointError: names the key, its value and what is accepted.
    """
    for key, values in accepted.items():
        value = raw.get(key, values[0])
        if value not in values:
            shown = ", ".join(json.dumps(each) for each in values if each is not None) or "null"
            raise CheckpointError(f"{key} is {json.dumps(value)}; not supported; accepted: {shown}")


def warn_of_code(raw: Mapping[str, Any], instead: str) -> None:
    """Says that code that comes with a checkpoint is never run, and what is done instead."""
    if raw.get("auto_map"):
        logger.warning("config.json names code of its own (auto_map), which is never run: %s", instead)


def warn_of_unknown(raw: Mapping[str, Any], known: Collection[str]) -> None:
    """Names the keys that nobody knows, which are ignored."""
    unknown = sorted(key for key in raw if key not in known)
    if unknown:
        logger.warning("config.json has keys that are not known here and are ignored: %s", ", ".join(unknown))
