"""Runs a list of checks of which none can end the others, and writes what came of them as one report."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_aot.errors import BuildError
from qwen_aot.str_enum import StrEnum
from qwen_aot.whole_file import write_whole

_TITLE = "# qwen-aot gpu-check"  # of the report as text


class Outcome(StrEnum):
    """What came of a step."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class Skip(Exception):  # noqa: N818  it is no error
    """Raised by a step that can't run here; its message says what is missing."""


class Failure(Exception):  # noqa: N818  it carries what was measured
    """Raised by a step that ran and found something wrong.

    Attributes:
        details: what it found, as plain JSON values.
    """

    def __init__(self, message: str, details: Mapping[str, Any]) -> None:
        self.details = details
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Step:
    """One check.

    Attributes:
        uses_gpu: whether it proves something about the GPU.
        needs: names of steps that must have passed.
        run: gives details as plain JSON values, or raises.
    """

    name: str
    uses_gpu: bool
    run: Callable[[], Mapping[str, Any]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of one step."""

    name: str
    uses_gpu: bool
    outcome: Outcome
    seconds: float
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    traceback: str = ""


def run_steps(steps: Sequence[Step], on_result: Callable[[StepResult], None] = lambda result: None) -> list[StepResult]:
    """Runs the steps in order; whatever one raises is its own result (Ctrl-C ends all)."""
    results: list[StepResult] = []
    for step in steps:
        passed = {result.name for result in results if result.outcome is Outcome.PASSED}
        missing = [name for name in step.needs if name not in passed]
        result = _skipped(step, f"needs {', '.join(missing)}") if missing else _run(step)
        results.append(result)
        on_result(result)
    return results


def _skipped(step: Step, why: str, seconds: float = 0.0) -> StepResult:
    return StepResult(step.name, step.uses_gpu, Outcome.SKIPPED, seconds, why)


def _run(step: Step) -> StepResult:
    start = time.perf_counter()
    try:
        details = step.run()
    except Skip as skip:
        return _skipped(step, str(skip), time.perf_counter() - start)
    except Exception as error:
        details = error.details if isinstance(error, Failure) else {}
        text = "" if isinstance(error, Failure) else traceback.format_exc()
        seconds = time.perf_counter() - start
        message = str(error) or type(error).__name__
        return StepResult(step.name, step.uses_gpu, Outcome.FAILED, seconds, message, details, text)
    return StepResult(step.name, step.uses_gpu, Outcome.PASSED, time.perf_counter() - start, details=details)


def has_passed(results: Sequence[StepResult]) -> bool:
    """Whether nothing failed, and something was proved about the GPU."""
    outcomes = [result.outcome for result in results]
    return Outcome.FAILED not in outcomes and any(
        result.uses_gpu and result.outcome is Outcome.PASSED for result in results
    )


def report_files(base: Path) -> tuple[Path, Path]:
    """`base`.json and `base`.md, which may be written: they are free, or an earlier report.

    Raises:
        BuildError: something else is there.
    """
    as_json, as_text = base.with_name(f"{base.name}.json"), base.with_name(f"{base.name}.md")
    for path, is_report in ((as_json, _is_json_report), (as_text, _is_text_report)):
        try:
            if path.exists() and not (path.is_file() and is_report(path)):
                raise BuildError(f"{path} is there and is no report of gpu-check; give another name with -o")
        except OSError as error:
            raise BuildError(f"{path} can't be read ({error.strerror}); give another name with -o") from error
    return as_json, as_text


def write_report(base: Path, machine: Mapping[str, Any], results: Sequence[StepResult]) -> tuple[Path, Path]:
    """Writes `base`.json and `base`.md, each whole or not at all; returns both.

    Raises:
        BuildError: something that is no report is there.
        OSError: they can't be written.
    """
    as_json, as_text = report_files(base)
    verdict = has_passed(results)
    document = {"passed": verdict, "machine": machine, "steps": [asdict(result) for result in results]}
    as_json.parent.mkdir(parents=True, exist_ok=True)
    write_whole(as_json, (json.dumps(document, indent=2, default=str) + "\n").encode())
    write_whole(as_text, _markdown(verdict, machine, results).encode())
    return as_json, as_text


def _is_json_report(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.keys() == {"passed", "machine", "steps"}


def _is_text_report(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_TITLE) + 1) == f"{_TITLE}\n".encode()


def _markdown(verdict: bool, machine: Mapping[str, Any], results: Sequence[StepResult]) -> str:
    lines = [_TITLE, "", "**passed**" if verdict else "**not passed**", "", "## Steps", ""]
    lines += ["| step | GPU | outcome | seconds | |", "| --- | --- | --- | ---: | --- |"]
    for result in results:
        message = (result.message.splitlines() or [""])[0].replace("|", "\\|")
        on_gpu = "yes" if result.uses_gpu else ""
        lines.append(f"| {result.name} | {on_gpu} | {result.outcome} | {result.seconds:.1f} | {message} |")
    for result in results:
        if result.details or result.traceback or "\n" in result.message:
            lines += ["", f"### {result.name}", ""]
            lines += _code(result.message, "text") if "\n" in result.message else []
            lines += _code(json.dumps(result.details, indent=2, default=str), "json") if result.details else []
            lines += _code(result.traceback, "text") if result.traceback else []
    lines += ["", "## Machine", "", *_code(json.dumps(machine, indent=2, default=str), "json")]
    return "\n".join(lines) + "\n"


def _code(text: str, language: str) -> list[str]:
    return [f"~~~{language}", text.rstrip(), "~~~"]
