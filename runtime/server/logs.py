"""What a server logs: one line a request and one for each event of its life, as text or JSON. Never a prompt."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any

__all__ = ["FORMATS", "show_server_logs"]

FORMATS = ("text", "json")
_FIELDS = "fields"  # of a record: a dict of what is logged besides the message


class _Text(logging.Formatter):
    """`2026-01-31T12:00:00.000Z info request method=POST path=/v1/completions ...`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback behind it."""
        fields = getattr(record, _FIELDS, {})
        pairs = "".join(f" {name}={value}" for name, value in fields.items())
        line = f"{_time(record)} {record.levelname.lower()} {_printable(record.getMessage() + pairs)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class _Handler(logging.Handler):
    """Writes to what is standard error now; nobody stops because nobody reads it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        if sys.stderr is None:
            return
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  as logging has it
        """Loses it."""


def show_server_logs(form: str) -> None:
    """Sends the records of the server and of uvicorn to standard error.

    Args:
        form: one of FORMATS.
    """
    handler = _Handler()
    handler.setFormatter(_Json() if form == "json" else _Text())
    for name, level in (("qwen_aot", logging.INFO), ("uvicorn", logging.ERROR), ("asyncio", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _time(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _printable(text: str) -> str:
    """Without control characters: a path comes from a client."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
