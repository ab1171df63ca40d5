"""How every verb behaves on a terminal: grouped help, exit codes, errors without traceback, lazy loading."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, cast

import click

from qwen_aot.errors import DeployError
from qwen_aot.extras import missing_package
from qwen_aot.runtime.cli.console import drop, tell

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INCONCLUSIVE = 0, 1, 2, 3
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

# A finger that stays on Ctrl-C, or a shell that passes it on as well, means one wish: what comes so soon after the
# first doesn't cut the cleaning up. Later ones count again, should a library have swallowed the first.
SAME_WISH_SECONDS = 1.0

NARROWEST_HELP = 24  # columns


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb of the group: where it lives and the line `--help` shows, so that help imports nothing."""

    module: str
    help: str


class GroupedOption(click.Option):
    """An option that `--help` shows under a heading, with its default.

    A help text that is a function is called when it is shown: it may import what a running verb would.
    """

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        kwargs.setdefault("show_default", True)
        self._make_help = kwargs.pop("help") if callable(kwargs.get("help")) else None
        super().__init__(*args, **kwargs)
        self.group = group

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """What `--help` shows of it."""
        if self._make_help is not None:
            self.help = self._make_help()
        return super().get_help_record(ctx)


def option(*names: str, group: str = "Options", **kwargs: Any) -> Callable[[Any], Any]:
    """`click.option` whose help stands under the heading `group` and shows its default."""
    return click.option(*names, cls=GroupedOption, group=group, **kwargs)


class _HelpFormatter(click.HelpFormatter):
    """Help for the terminal that there is, however narrow (click's own is never below 50 columns)."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        columns = shutil.get_terminal_size().columns - 1
        super().__init__(indent_increment, width or max(NARROWEST_HELP, min(columns, max_width or columns)), max_width)

    def write_heading(self, heading: str) -> None:
        """Writes a heading, on several lines if it must."""
        self.write(f"{click.wrap_text(f'{heading}:', self.width)}\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Writes names and what they mean side by side."""
        super().write_dl(rows, min(col_max, self.width // 3), col_spacing)


class _Context(click.Context):
    formatter_class = _HelpFormatter


class _Terminal(click.Command):
    """Turns what a command raises into a message on stderr and an exit code."""

    context_class = _Context

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs the command and exits: 0 ok, 1 failed, 2 usage, 3 inconclusive, 130 Ctrl-C, 143 SIGTERM."""
        kwargs["standalone_mode"] = False
        _open_closed_streams()
        for stream in (sys.stdout, sys.stderr):
            # A locale without the characters of an answer; C's lets through what came in as bytes and nothing else.
            if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
                stream.reconfigure(errors="replace")
        with _Stop() as stop:
            try:
                result = super().main(*args, **kwargs)
                sys.stdout.flush()
                code = result if isinstance(result, int) else EXIT_OK
            except BaseException as error:
                code = _report(stop.reason or error)
        sys.exit(code)


def run_to_end(command: click.Command, name: str) -> NoReturn:
    """Runs a command as all that this process does: Ctrl-C while the interpreter shuts down is not an error."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: None)  # what the command puts back when it is done
    try:
        command.main(prog_name=name)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the last thing Python does with its own handlers is to drop them
    raise AssertionError("a command's main exits")


class VerbCommand(_Terminal):
    """A verb: options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one section a group, in order of first use, `--help` last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "group", "Help"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class LazyGroup(_Terminal, click.Group):
    """A group that knows its verbs' help lines and imports a verb only when it runs."""

    def __init__(self, *args: Any, verbs: Mapping[str, Verb], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of the table."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the verb's module."""
        if cmd_name not in self._verbs:
            return None
        return cast(click.Command, importlib.import_module(self._verbs[cmd_name].module).command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in self._verbs.items()])


class _Terminated(BaseException):
    """SIGTERM, raised like Ctrl-C's KeyboardInterrupt, so that half-written files are cleaned up."""


class _Stop:
    """While entered, Ctrl-C and SIGTERM raise, and `reason` keeps what they raised.

    Libraries turn an exception that strikes within them into one of their own; the reason is still the signal.
    """

    def __init__(self) -> None:
        self.reason: BaseException | None = None
        self._struck = 0.0  # by time.monotonic(), once there is a reason
        self._previous: list[tuple[int, Any]] = []

    def __enter__(self) -> _Stop:
        for number, reason in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, _Terminated)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as for a shell's background jobs
                self._previous.append((number, signal.signal(number, self._handler(reason))))
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous:
            signal.signal(number, handler)

    def _handler(self, reason: type[BaseException]) -> Callable[[int, FrameType | None], None]:
        def stop(number: int, frame: FrameType | None) -> None:
            if self.reason is not None and time.monotonic() - self._struck < SAME_WISH_SECONDS:
                return
            self._struck = time.monotonic()
            self.reason = reason()
            raise self.reason

        return stop


def _report(error: BaseException) -> int:
    """Says on stderr what ended a command, and gives its exit code. What we don't know is our bug: raises."""
    match error:
        case click.ClickException():
            shown = io.StringIO()
            error.show(shown)
            tell(shown.getvalue().rstrip("\n"))
            return error.exit_code
        case DeployError():
            tell(f"error: {error}")
        case ModuleNotFoundError():
            tell(f"error: {missing_package('this command', error)}")
        case KeyboardInterrupt() | click.Abort():
            tell("interrupted")
            return EXIT_INTERRUPTED
        case _Terminated():
            tell("terminated")
            return EXIT_TERMINATED
        case BrokenPipeError():  # `qwen-aot inspect … | head`; while the command runs, click does the same
            drop(sys.stdout)
        case OSError():  # a full disk behind stdout, a file that may not be read
            tell(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
            try:
                sys.stdout.flush()
            except OSError:
                drop(sys.stdout)
        case _:
            raise error
    return EXIT_FAILED


def _open_closed_streams() -> None:
    """Gives a stream that was closed (`>&-`) somewhere to go, before a file of ours gets its number and its text."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(fd)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != fd:
                os.dup2(nowhere, fd)
                os.close(nowhere)
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  as long as the process
