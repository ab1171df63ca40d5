"""Results to stdout, progress and logs to stderr; the same numbers written the same way everywhere."""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol, TextIO, cast

import click
from rich.console import Console
from rich.text import Text

from qwen_aot.runtime.cli.visible import visible, visible_line

PIPE_COLUMNS = 10_000  # where stdout is no terminal: a row of a table is a line
WIDE_ENOUGH, NARROWEST_BAR = 70, 10  # columns of a terminal whose progress lines have a bar and its length there
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


class _Console(Console):
    """A console on which text can't do what a terminal does on control characters, and `:name:` is no picture."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A styled text of a string, whose control characters are spelled out."""
        return super().render_str(visible(text), **options)


class _LastingStderr:
    """Standard error as a file that never fails: a job isn't lost because nobody hears of it any more."""

    def write(self, text: str) -> int:
        """Writes what can be written."""
        if sys.stderr is not None:
            try:
                return sys.stderr.write(text)
            except (OSError, ValueError):
                drop(sys.stderr)
        return len(text)

    def flush(self) -> None:
        """Writes what is held back."""
        if sys.stderr is not None:
            try:
                sys.stderr.flush()
            except (OSError, ValueError):
                drop(sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def drop(stream: TextIO) -> None:
    """Sends what a stream still holds nowhere: Python would fail on it once more at its end."""
    with contextlib.suppress(OSError, ValueError):  # without a file number: nothing will be written
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sees what is written to it (a closed stream is None)."""
    return stream is not None and stream.isatty()


def can_draw() -> bool:
    """Whether standard error is a terminal on which a line can be drawn over."""
    return is_terminal(sys.stderr) and os.environ.get("TERM", "") not in ("dumb", "unknown", "")


_stderr: tuple[TextIO | None, Console] | None = None  # the stream, and the one console for it


def stderr() -> Console:
    """The console for progress and logs: one, so that a line of a log goes above a bar and not into it."""
    global _stderr
    if _stderr is None or _stderr[0] is not sys.stderr:
        file = cast(IO[str], _LastingStderr()) if sys.stderr is not None else None
        _stderr = sys.stderr, _Console(stderr=True, file=file, **_size_of(sys.stderr))
    return _stderr[1]


def stdout() -> Console:
    """A console for results; as wide as any table where it isn't a terminal."""
    return _Console(**_size_of(sys.stdout))


def _size_of(stream: TextIO | None) -> dict[str, int]:
    """Columns and lines for a console: Rich takes any terminal that can't move its cursor for 80 columns."""
    size = shutil.get_terminal_size()
    return {"width": size.columns if is_terminal(stream) else PIPE_COLUMNS, "height": size.lines}


def tell(text: str) -> None:
    """A message on stderr, broken between words on a terminal; nothing if it can't be written."""
    console = stderr()
    console.print(Text(visible(text)), highlight=False, soft_wrap=not is_terminal(sys.stderr), overflow="fold")
    console.file.flush()


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """Says on stderr what is being done while that can't say how far it is: a line that moves, or a plain one."""
    if can_draw():
        with stderr().status(Text(visible_line(what))):
            yield
    else:
        tell(f"{what} ...")
        yield


def put_answer(text: str) -> None:
    """A model's words to stdout as they come: exactly, but on a terminal without control characters."""
    sys.stdout.write(visible(text) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """One JSON object on stdout; escaped where stdout can't hold every character."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    click.echo(json.dumps(value, indent=2, ensure_ascii=not is_utf8, default=str))


class _LogHandler(logging.Handler):
    """Tells records as messages are told, above a progress bar and without control characters."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        tell(f"{record.levelname.lower()}: {self.format(record)}")


def show_logs(level: int = logging.WARNING) -> None:
    """Sends our packages' log records to stderr, once."""
    logger = logging.getLogger("qwen_aot")
    if not any(isinstance(handler, _LogHandler) for handler in logger.handlers):
        logger.addHandler(_LogHandler(level))
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


def count(value: int, what: str) -> str:
    """Things for people: 1 round, 2 rounds."""
    return f"{value} {what}" if value == 1 else f"{value} {what}s"


def amount(value: float, unit: str) -> str:
    """A count for people: bytes scaled, anything else as it is."""
    if unit == "bytes":
        return size(value)
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"  # a rate may be less than one a second


@contextlib.contextmanager
def progress_on_stderr() -> Iterator[Callable[[ProgressEvent], None]]:
    """A progress bar with stage, rate and time left; plain lines where stderr is no terminal that can draw."""
    if not can_draw():
        yield _PlainProgress()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = stderr()
    columns = [
        TextColumn("{task.fields[step]}", markup=False),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    ]
    if console.width >= WIDE_ENOUGH:
        left = TextColumn("left", markup=False), TimeRemainingColumn()
        columns[2:2] = [BarColumn(bar_width=console.width - WIDE_ENOUGH + NARROWEST_BAR)]
        columns += [*left, TextColumn("{task.fields[rate]}", markup=False)]
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def show(event: ProgressEvent) -> None:
            if event.stage not in tasks:
                step = f"[{event.index}/{event.count}]"
                tasks[event.stage] = progress.add_task(event.stage, total=None, step=step, rate="")
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
            tell(f"{prefix} ...")
        if event.total == event.done == 1:
            tell(f"{prefix}: {duration(now - self._start)}")
        elif event.total and self._first is None:
            self._first, self._last = (now, event.done), now
        elif event.total and self._first is not None and now - self._last >= LINE_SECONDS:
            self._last = now
            rate = (event.done - self._first[1]) / (now - self._first[0])
            left = duration((event.total - event.done) / rate) if rate else "?"
            tell(
                f"{prefix}: {100 * event.done / event.total:.0f} % of {amount(event.total, event.unit)}, "
                f"{amount(rate, event.unit)}/s, {left} left"
            )
