"""Real pseudo terminals for the command line: one for this process's own streams, and one for a process of its own.

What a terminal shows is read back through pyte, a terminal emulator, so that moves, erasures and wrapping count.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pyte

from qwen_aot.runtime.cli.main import qwen_aot

ROOT = Path(__file__).parents[3]
LINES = 1000  # tall enough that nothing scrolls away
UNSET = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")  # what decides how Rich draws


@dataclass(frozen=True, slots=True)
class Shown:
    """What came of a command on a terminal.

    Attributes:
        raw: every character that it wrote.
        text: what stands on the screen at its end, without trailing blanks.
    """

    exit_code: int
    raw: str
    text: str

    @property
    def lines(self) -> list[str]:
        """The screen's lines."""
        return self.text.splitlines()


def draw(raw: str, columns: int) -> str:
    """What a terminal of that width shows of a text."""
    screen = pyte.Screen(columns, LINES)
    pyte.Stream(screen).feed(raw)
    return "\n".join(line.rstrip() for line in screen.display).rstrip()


def open_terminal(columns: int) -> tuple[int, int]:
    """(our end, the program's end) of a new pseudo terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    return ours, theirs


def run_on_streams(arguments: Sequence[object], stdin: int, stdout: int, stderr: int) -> int:
    """Runs `qwen-aot` in this process with its three streams on these files; returns its exit code."""
    saved = [os.dup(fd) for fd in (0, 1, 2)]
    streams = sys.stdin, sys.stdout, sys.stderr
    opened: list[TextIO] = []
    try:
        for fd, onto in ((stdin, 0), (stdout, 1), (stderr, 2)):
            os.dup2(fd, onto)
        opened += [os.fdopen(fd, mode, encoding="utf-8", closefd=False) for fd, mode in enumerate("rww")]
        sys.stdin, sys.stdout, sys.stderr = opened
        try:
            qwen_aot.main([str(argument) for argument in arguments], prog_name="qwen-aot")
        except SystemExit as end:
            return int(end.code or 0)
        raise AssertionError("a command's main exits")
    finally:
        for stream in opened:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = streams
        for fd, onto in zip(saved, (0, 1, 2), strict=True):
            os.dup2(fd, onto)
            os.close(fd)


@contextlib.contextmanager
def environment(changes: dict[str, str | None]) -> Iterator[None]:
    """Sets variables (None: unsets) for a while."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        for name, value in changes.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def show(*arguments: object, columns: int = 80, **variables: str) -> Shown:
    """Runs `qwen-aot` in this process on a terminal of its own.

    Args:
        *arguments: of the command line.
        columns: of the terminal.
        **variables: of the environment, besides TERM=xterm-256color.
    """
    ours, theirs = open_terminal(columns)
    pieces: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(ours, 65536):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with environment({**dict.fromkeys(UNSET), "TERM": "xterm-256color", **variables}):
            code = run_on_streams(arguments, theirs, theirs, theirs)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    raw = b"".join(pieces).decode(errors="replace")
    return Shown(code, raw, draw(raw, columns))


class Terminal:
    """A process on a terminal of its own, as a user sits at it: what is typed comes from the keyboard.

    Attributes:
        seen: everything that the terminal has shown.
    """

    def __init__(self, *arguments: str, columns: int = 80, program: Sequence[str] = ("-m", "qwen_aot")) -> None:
        self._ours, theirs = open_terminal(columns)
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            # Spelled out: readline, which pytest imports, sets the size of its own terminal behind Python's back.
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        self.seen = ""
        self.columns = columns

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self._ours, text.encode())

    def read(self, seconds: float) -> None:
        """Reads once, if anything comes in that time."""
        if select.select([self._ours], [], [], seconds)[0]:
            with contextlib.suppress(OSError):  # EIO: the process is gone
                self.seen += os.read(self._ours, 65536).decode(errors="replace")

    def read_all(self) -> None:
        """Reads until nothing has come for a second."""
        seen = -1
        while seen != len(self.seen):
            seen = len(self.seen)
            self.read(1)

    def read_until(self, mark: str, start: int = 0) -> None:
        """Reads until the mark stands behind `start`."""
        deadline = time.monotonic() + 40
        while mark not in self.seen[start:] and time.monotonic() < deadline:
            self.read(0.5)
        assert mark in self.seen[start:], self.seen[-500:]

    def press_until(self, key: str, mark: str, start: int = 0) -> None:
        """Presses a key, and again where it has no effect: Python's readline misses a Ctrl-C just before it waits."""
        for _ in range(8):
            self.type(key)
            deadline = time.monotonic() + 5
            while mark not in self.seen[start:] and time.monotonic() < deadline:
                self.read(0.5)
            if mark in self.seen[start:]:
                return
        raise AssertionError(self.seen[-500:])

    def screen(self) -> str:
        """What stands on the screen."""
        return draw(self.seen, self.columns)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def _take_terminal() -> None:
    """In the new process: its standard input is its controlling terminal, so that keys send signals."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell ignores it and would hand that on
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
