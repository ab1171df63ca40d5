"""Standard streams that are closed, full or broken, for every verb: quiet or a message, never a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.cli import bench
from tests.runtime.cli.terminal import ROOT, run_on_streams
from tests.runtime.cli.test_screens import MEASURED

QWEN_AOT = [sys.executable, "-m", "qwen_aot"]
SHORT = ("--prompt-ids", "5,9", "--temperature", "0", "--max-new-tokens", "3", "--ignore-eos")
VERBS: dict[str, tuple[str, ...]] = {
    "--help": (),
    "build": ("qwen1.5-0.5b", "--random-weights", "-o", "out", "--precision", "fp7"),
    "chat": ("bundle", "--max-new-tokens", "2"),
    "generate": ("bundle", *SHORT),
    "bench": ("bundle",),
    "inspect": ("bundle",),
    "plan": ("qwen1.5-0.5b", "--device", "l4"),
    "doctor": (),
}
ON_STDOUT = [verb for verb in VERBS if verb != "build"]
AS_JSON = ("generate", "bench", "inspect", "plan", "doctor")
CASES = [(verb, VERBS[verb]) for verb in ON_STDOUT] + [(verb, (*VERBS[verb], "--json")) for verb in AS_JSON]


@pytest.fixture
def place(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bundle").symlink_to(bundle)
    (tmp_path / "typed").write_text("Hello\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "measure_bundle", lambda *arguments, **options: MEASURED)
    return tmp_path


@contextlib.contextmanager
def opened(path: str | Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def run_with(
    place: Path, arguments: tuple[str, ...], *, stdout: int | None = None, stderr: int | None = None
) -> tuple[int, str]:
    """Its exit code, and what came on standard error if that is None."""
    heard = place / "stderr"
    with (
        opened(place / "typed", os.O_RDONLY) as stdin,
        opened(heard, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as told,
        opened(os.devnull, os.O_WRONLY) as nowhere,
    ):
        code = run_on_streams(
            arguments, stdin, nowhere if stdout is None else stdout, told if stderr is None else stderr
        )
    return code, heard.read_text()


def messages(heard: str) -> list[str]:
    """Lines but those that say what is being done."""
    return [line for line in heard.splitlines() if not line.endswith(" ...") and not line.startswith("[")]


@pytest.mark.parametrize(("verb", "arguments"), CASES)
def test_a_reader_that_is_gone_is_no_error_to_speak_of(place: Path, verb: str, arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        code, heard = run_with(place, (verb, *arguments), stdout=write)
    finally:
        os.close(write)
    assert (code, messages(heard)) == (1, [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(("verb", "arguments"), CASES)
def test_a_full_disk_is_an_error(place: Path, verb: str, arguments: tuple[str, ...]) -> None:
    with opened("/dev/full", os.O_WRONLY) as full:
        code, heard = run_with(place, (verb, *arguments), stdout=full)
    assert (code, messages(heard)) == (1, ["error: No space left on device"])


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("is_full", [True, False], ids=["full", "broken"])
def test_a_standard_error_that_nobody_hears_changes_nothing(place: Path, verb: str, is_full: bool) -> None:
    read, broken = os.pipe()
    os.close(read)
    with opened("/dev/full", os.O_WRONLY) as full:
        code, _ = run_with(place, (verb, *VERBS[verb]), stderr=full if is_full else broken)
    os.close(broken)
    assert code == (2 if verb == "build" else 0)


def closed(fd: int) -> Any:
    """For a process of its own: closes a stream, as a shell does with `>&-`."""
    return lambda: os.close(fd)


@pytest.mark.parametrize("fd", [1, 2], ids=["stdout", "stderr"])
@pytest.mark.parametrize("verb", ["generate", "inspect", "doctor"])
def test_a_stream_that_is_closed_from_the_start(place: Path, verb: str, fd: int) -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes["stdout" if fd == 1 else "stderr"] = None
    done = subprocess.run(
        [*QWEN_AOT, verb, *VERBS[verb]], cwd=place, timeout=120, check=False, text=True, preexec_fn=closed(fd), **pipes
    )
    assert done.returncode == 0, done.stderr
    if fd == 1:
        assert messages(done.stderr) == []
    else:
        assert done.stdout


@pytest.mark.timeout(120, func_only=True)
def test_a_build_whose_standard_error_breaks_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    """The one who watched is gone after the first line: the bundle is whole, and the exit code says so."""
    out = tmp_path / "bundle"
    process = subprocess.Popen(
        [*QWEN_AOT, "build", str(checkpoint), "-o", str(out), "--precision", "fp32"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN),
    )
    assert process.stdout is not None and process.stderr is not None
    assert b"[1/" in process.stderr.readline()
    process.stderr.close()
    assert b"cpu fp32" in process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0
    assert load_bundle(out).manifest.engines.text.precision == "fp32"
