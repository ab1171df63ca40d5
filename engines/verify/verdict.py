"""What a comparison can end in."""

from __future__ import annotations

from collections.abc import Iterable

from qwen_aot.str_enum import StrEnum


class Verdict(StrEnum):
    """Passed: everything that was asked was shown. Failed: something is wrong. Inconclusive: neither was shown."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """All of them together: one failure fails, and one that shows nothing leaves the whole inconclusive."""
        found = list(verdicts)
        return next((verdict for verdict in (cls.FAILED, cls.INCONCLUSIVE) if verdict in found), cls.PASSED)
