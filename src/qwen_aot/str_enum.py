"""StrEnum of the standard library, for Python 3.10 as well (JetPack 6 has it); standard library only."""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):
        """Members are strings, and look like their values."""

        __str__ = str.__str__
        __format__ = str.__format__  # type: ignore[assignment]  # as the standard library has it


__all__ = ["StrEnum"]
