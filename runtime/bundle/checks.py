"""Checks that several parts of a manifest share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from qwen_aot.errors import BundleError

__all__ = [
    "MAX_BYTES",
    "MAX_COUNT",
    "is_sha256",
    "require_counts",
    "require_one_of",
    "require_sha256",
    "require_within",
]

MAX_COUNT = 2**31 - 1  # graphs keep lengths and sizes in int32
MAX_BYTES = 2**63 - 1

_SHA256 = re.compile(r"[0-9a-f]{64}")


def require_counts(instance: Any, *names: str, least: int = 1, most: int = MAX_COUNT) -> None:
    """Each of these fields lies within the limits, or is None where its type allows that.

    Raises:
        BundleError: names the field.
    """
    require_within({name: getattr(instance, name) for name in names}, least, most)


def require_within(values: Mapping[str, int | None], least: int, most: int = MAX_COUNT) -> None:
    """Each value lies within the limits; None passes.

    Raises:
        BundleError: names the first that doesn't.
    """
    for name, value in values.items():
        if value is not None and not least <= value <= most:
            raise BundleError(f"{name} is {value}; accepted: {least} to {most}")


def require_one_of(what: str, value: str, accepted: Collection[str]) -> None:
    """A member of a closed set.

    Raises:
        BundleError: it isn't one.
    """
    if value not in accepted:
        raise BundleError(f"{what} is {value!r}; accepted: {', '.join(accepted)}")


def is_sha256(value: str) -> bool:
    """Whether this is a hash as manifests write it."""
    return _SHA256.fullmatch(value) is not None


def require_sha256(what: str, value: str) -> None:
    """A hash as manifests write it.

    Raises:
        BundleError: it isn't one.
    """
    if not is_sha256(value):
        raise BundleError(f"{what} is {value!r}; accepted: 64 lower-case hex digits")
