"""Progress without a terminal, and numbers for people."""

from __future__ import annotations

import logging

import pytest

from qwen_aot.engines.bundle.progress import ProgressEvent
from qwen_aot.runtime.cli import console
from qwen_aot.runtime.cli.console import amount, duration, progress_on_stderr, size


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")]
)
def test_size(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.04, "0.0 s"), (99.4, "99.4 s"), (245, "4 min 05 s")])
def test_duration(value: float, text: str) -> None:
    assert duration(value) == text


def test_amount_knows_its_unit() -> None:
    assert amount(2e6, "bytes") == "2 MB"
    assert amount(12.3, "positions") == "12 positions"


def test_lines_have_stage_share_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 1.0, 10.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with progress_on_stderr() as show:
        show(ProgressEvent("write weights", 3, 5))
        show(ProgressEvent("write weights", 3, 5, 10_000_000, 100_000_000))  # counting begins
        show(ProgressEvent("write weights", 3, 5, 55_000_000, 100_000_000))
        show(ProgressEvent("write weights", 3, 5, 1, 1))
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.splitlines() == [
        "[3/5] write weights ...",
        "[3/5] write weights: 55 % of 100 MB, 5 MB/s, 9.0 s left",
        "[3/5] write weights: 20.0 s",
    ]


def test_warnings_of_our_packages_are_messages_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("qwen_aot")
    before = logger.handlers[:], logger.propagate
    try:
        logger.handlers[:] = []
        console.show_logs()
        console.show_logs()
        logging.getLogger("qwen_aot.engines.build").warning("%s is [bold]odd[/]\x1b[2J", "a model " * 30)
        logging.getLogger("qwen_aot.engines.build").info("nothing to say")
    finally:
        logger.handlers[:], logger.propagate = before
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", f"warning: {'a model ' * 30} is [bold]odd[/]\\x1b[2J\n")
