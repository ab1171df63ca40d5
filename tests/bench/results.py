"""Where a benchmark puts its numbers: a file that isn't there yet."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def new_file(text: str) -> Path:
    """The type of an option: told before hours of work, and never over what stands there."""
    path = Path(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{path} exists already; give another name, or move it away")
    return path


def write_new(path: Path, results: object) -> None:
    """Writes the results as JSON.

    Raises:
        FileExistsError: meanwhile something has come there.
    """
    with path.open("x", encoding="utf-8") as file:
        json.dump(results, file)
