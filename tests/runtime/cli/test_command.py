"""Exit codes, messages and lazy loading, whatever the verb."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from qwen_aot.errors import BuildError
from qwen_aot.extras import install_command
from qwen_aot.runtime.cli.command import LazyGroup, Verb, VerbCommand, option

ROOT = Path(__file__).parents[3]


def verb_that_raises(error: BaseException) -> click.Command:
    @click.command("work", cls=VerbCommand)
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BuildError("the disk is full; free some"), 1, "error: the disk is full; free some\n"),
        (click.UsageError("give one"), 2, "give one"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (PermissionError(13, "Permission denied", "/x/config.json"), 1, "error: /x/config.json: Permission denied\n"),
        (ModuleNotFoundError("no", name="torch.nn"), 1, "needs the package 'torch'"),
        (ModuleNotFoundError("no", name="torch"), 1, f"`{install_command('build')}`"),
        (ModuleNotFoundError("no", name="onnxruntime"), 1, f"`{install_command('cpu')}`"),
    ],
)
def test_what_is_raised_becomes_a_code_and_a_message(error: BaseException, code: int, message: str) -> None:
    result = CliRunner().invoke(verb_that_raises(error))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("error", [ValueError("bug"), ModuleNotFoundError("bug", name="qwen_aot.engines.nothing")])
def test_our_bugs_keep_their_traceback(error: Exception) -> None:
    result = CliRunner().invoke(verb_that_raises(error))
    assert result.exception is error


@pytest.mark.parametrize(
    ("number", "code", "message"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")]
)
@pytest.mark.parametrize("raised", [ValueError("wrapped"), BuildError("wrapped"), SystemExit(1)])
def test_a_signal_is_the_reason_whatever_a_library_makes_of_it(
    number: signal.Signals, code: int, message: str, raised: BaseException
) -> None:
    @click.command("work", cls=VerbCommand)
    def command() -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise raised from error

    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        result = CliRunner().invoke(command)
        assert (result.exit_code, result.stderr) == (code, message)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
            signal.default_int_handler,
            before[1],
        )
    finally:
        signal.signal(signal.SIGINT, before[0])


@pytest.fixture
def own_handler() -> Iterator[None]:
    """Ctrl-C as a terminal's process has it: a background job of a shell, as this test may be, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("own_handler")
@pytest.mark.parametrize(("seconds", "is_cleaned"), [(60.0, True), (0.0, False)])
def test_a_second_signal_at_once_does_not_cut_the_cleaning_up(
    seconds: float, is_cleaned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_aot.runtime.cli.command.SAME_WISH_SECONDS", seconds)
    cleaned: list[bool] = []

    @click.command("work", cls=VerbCommand)
    def command() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned.append(True)

    result = CliRunner().invoke(command)
    assert (result.exit_code, result.stderr.strip(), cleaned == [True]) == (130, "interrupted", is_cleaned)


def test_a_signal_while_the_interpreter_shuts_down_changes_nothing() -> None:
    code = """
import atexit, signal, sys
from qwen_aot.runtime.cli.main import main
atexit.register(signal.raise_signal, signal.SIGINT)
sys.argv = ["qwen-aot", "inspect", "nothing"]
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert result.returncode == 2
    assert "'nothing' does not exist" in result.stderr
    assert "Traceback" not in result.stderr and "KeyboardInterrupt" not in result.stderr


def test_options_stand_under_their_headings_with_defaults() -> None:
    @click.command("work", cls=VerbCommand)
    @click.argument("thing")
    @option("--size", default=7, help="How large.", group="Shape")
    @option("--fast", is_flag=True, help="Hurry.", group="Speed")
    def command(thing: str, size: int, fast: bool) -> None: ...

    text = CliRunner().invoke(command, ["--help"]).stdout
    assert text.index("Shape:") < text.index("--size") < text.index("Speed:") < text.index("--fast")
    assert "[default: 7]" in text


def test_a_group_lists_verbs_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    group = LazyGroup("tool", verbs={"work": Verb("a_module_that_is_not_there", "Do the work.")})
    result = CliRunner().invoke(group, ["--help"])
    assert result.exit_code == 0
    assert "work  Do the work." in result.stdout
    module = ModuleType("a_module_that_is_not_there")
    module.command = verb_that_raises(BuildError("ran"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert CliRunner().invoke(group, ["work"]).stderr == "error: ran\n"


def test_an_unknown_verb_is_a_usage_error() -> None:
    result = CliRunner().invoke(LazyGroup("tool", verbs={}), ["fly"])
    assert result.exit_code == 2
    assert "No such command 'fly'" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_behind_stdout_is_a_message() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "qwen_aot", "doctor", "--json"]
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert (result.returncode, result.stderr) == (1, b"error: No space left on device\n")
