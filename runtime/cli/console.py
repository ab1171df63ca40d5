"""Results to stdout, progress and logs to stderr; the same numbers written the same way everywhere."""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import click
from rich.console import Console
from rich.logging import RichHandler

PIPE_COLUMNS = 120
LINE_SECONDS = 5.0  # between two lines about one stage where stderr is not a terminal


class ProgressEvent(Protocol):
    """What `engines.bundle.progress.ProgressEvent` has."""

    @property
    def stage(self) -> str:
        """What is being done."""

    @property
    def index(self) -> int:
        """Of the stage, from 1."""

    @property
    def count(self) -> int:
        """Stages in all."""

    @property
    def done(self) -> int:
        """In `unit`."""

    @property
    def total(self) -> int:
        """In `unit`; 0 while unknown."""

    @property
    def unit(self) -> str:
        """`bytes`, or what is counted."""


def stderr() -> Console:
    """A console for progress and logs."""
    return Console(stderr=True)


def stdout() -> Console:
    """A console for results; wide enough for tables where it isn't a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE_COLUMNS)


def print_json(value: Any) -> None:
    """One JSON object on stdout; escaped where stdout can't hold every character."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    click.echo(json.dumps(value, indent=2, ensure_ascii=not is_utf8, default=str))


def show_logs(level: int = logging.WARNING) -> None:
    """Sends our packages' log records to stderr, once."""
    for name in ("engines", "exporter", "runtime"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
            handler = RichHandler(console=stderr(), show_time=False, show_path=False)
            handler.setLevel(level)
            logger.addHandler(handler)
            logger.propagate = False


def size(value: float) -> str:
    """Bytes for people: 1.25 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds for people: 12.3 s, 4 min 05 s."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def amount(value: float, unit: str) -> str:
    """A count for people: bytes scaled, anything else as it is."""
    return size(value) if unit == "bytes" else f"{value:.0f} {unit}"


@contextlib.contextmanager
def progress_on_stderr() -> Iterator[Callable[[ProgressEvent], None]]:
    """A progress bar with stage, rate and time left; plain lines where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield _PlainProgress()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("[{task.fields[index]}/{task.fields[count]}]"),
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TextColumn("{task.fields[rate]:>12}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr()) as progress:
        tasks: dict[str, Any] = {}

        def show(event: ProgressEvent) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = progress.add_task(
                    event.stage, total=None, index=event.index, count=event.count, rate=""
                )
            task = tasks[event.stage]
            speed = progress.tasks[task].speed
            rate = f"{amount(speed, event.unit)}/s" if speed and event.unit else ""
            progress.update(task, total=event.total or None, completed=event.done, rate=rate)

        yield show


class _PlainProgress:
    """A line when a stage starts, one every few seconds, and one when it ends."""

    def __init__(self) -> None:
        self._stage = ""
        self._start = self._last = 0.0
        self._first: tuple[float, int] | None = None  # when counting began, and at what: loading comes before

    def __call__(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        prefix = f"[{event.index}/{event.count}] {event.stage}"
        if event.stage != self._stage:
            self._stage, self._start, self._last, self._first = event.stage, now, now, None
            click.echo(f"{prefix} ...", err=True)
        if event.total == event.done == 1:
            click.echo(f"{prefix}: {duration(now - self._start)}", err=True)
        elif event.total and self._first is None:
            self._first, self._last = (now, event.done), now
        elif event.total and self._first is not None and now - self._last >= LINE_SECONDS:
            self._last = now
            rate = (event.done - self._first[1]) / (now - self._first[0])
            left = duration((event.total - event.done) / rate) if rate else "?"
            click.echo(
                f"{prefix}: {100 * event.done / event.total:.0f} % of {amount(event.total, event.unit)}, "
                f"{amount(rate, event.unit)}/s, {left} left",
                err=True,
            )
