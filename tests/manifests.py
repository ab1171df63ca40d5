"""The manifests of tests/golden/manifests.json, which every reader of a bundle must take or refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden" / "manifests.json"


def manifest_cases() -> list[dict[str, Any]]:
    """Every case: `what`, `text`, `accepted`, and of format version 1 `upgraded`."""
    cases: list[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
    return cases
