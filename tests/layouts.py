"""The folders of tests/golden/layouts.json, laid out on a disk."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden" / "layouts.json"


def layouts() -> list[dict[str, Any]]:
    """Every case."""
    cases: list[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
    return cases


def lay_out(case: dict[str, Any], root: Path) -> Path:
    """Makes a case's nodes under a folder; returns what is to be opened."""
    for node in case["nodes"]:
        path = root / node["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if "file" in node:
            path.write_bytes(base64.b64decode(node["file"]))
        elif "link" in node:
            path.symlink_to(node["link"].replace("{root}", str(root)))
        elif "pipe" in node:
            os.mkfifo(path)
        else:
            path.mkdir()
    return root / str(case["open"])
