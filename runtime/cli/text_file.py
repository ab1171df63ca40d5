"""Reads a file that was given with --text."""

from __future__ import annotations

from pathlib import Path

import click


def read_text(path: Path) -> str:
    """All of a file.

    Raises:
        click.UsageError: it isn't UTF-8; says where.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--text {path} isn't UTF-8 ({error.reason} at byte {error.start})") from None
