"""Steps: none ends the others, each is told apart, and the report holds them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.runtime.cli.check_steps import (
    Failure,
    Outcome,
    Skip,
    Step,
    StepResult,
    has_passed,
    report_files,
    run_steps,
    write_report,
)


def boom() -> dict[str, int]:
    raise ValueError("a | b\nsecond line")


def skip() -> dict[str, int]:
    raise Skip("no such library")


def fail() -> dict[str, int]:
    raise Failure("differs", {"found": 3})


STEPS = [
    Step("good", True, lambda: {"answer": 42}),
    Step("broken", False, boom),
    Step("absent", True, skip),
    Step("wrong", True, fail),
    Step("behind", True, lambda: {}, needs=("good", "wrong")),
    Step("beside", True, lambda: {}, needs=("good",)),
]


def test_each_step_has_its_own_result() -> None:
    seen: list[str] = []
    results = {result.name: result for result in run_steps(STEPS, lambda result: seen.append(result.name))}
    assert seen == [step.name for step in STEPS]
    assert {name: str(result.outcome) for name, result in results.items()} == {
        "good": "passed",
        "broken": "failed",
        "absent": "skipped",
        "wrong": "failed",
        "behind": "skipped",
        "beside": "passed",
    }
    assert results["good"].details == {"answer": 42}
    assert "ValueError: a | b" in results["broken"].traceback and "in boom" in results["broken"].traceback
    assert (results["wrong"].message, results["wrong"].details, results["wrong"].traceback) == (
        "differs",
        {"found": 3},
        "",
    )
    assert results["absent"].message == "no such library"
    assert results["behind"].message == "needs wrong"


def test_ctrl_c_ends_them_all() -> None:
    def interrupt() -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_steps([Step("a", True, interrupt), Step("b", True, lambda: {})])


def result(outcome: Outcome, uses_gpu: bool = True) -> StepResult:
    return StepResult("x", uses_gpu, outcome, 0.0)


@pytest.mark.parametrize(
    ("results", "verdict"),
    [
        ([result(Outcome.PASSED), result(Outcome.SKIPPED)], True),
        ([result(Outcome.PASSED), result(Outcome.FAILED, uses_gpu=False)], False),
        ([result(Outcome.PASSED, uses_gpu=False), result(Outcome.SKIPPED)], False),
        ([], False),
    ],
)
def test_the_verdict_needs_a_step_on_the_gpu_and_no_failure(results: list[StepResult], verdict: bool) -> None:
    assert has_passed(results) is verdict


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.md", "# my notes\n"),
        ("r.md", "# qwen-aot gpu-check and more\n"),
        ("r.json", "{}"),
        ("r.json", '{"passed": true, "machine": {}, "steps": [], "mine": 1}'),
        ("r.json", "no JSON"),
        ("r.json", None),
    ],
)
def test_a_file_that_is_no_report_is_not_overwritten(tmp_path: Path, name: str, content: str | None) -> None:
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    for act in (lambda: report_files(tmp_path / "r"), lambda: write_report(tmp_path / "r", {}, [])):
        with pytest.raises(
            BuildError, match=rf"{name} is there and is no report of gpu-check; give another name with -o"
        ):
            act()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert content is None or (tmp_path / name).read_text() == content


def test_a_report_replaces_a_report(tmp_path: Path) -> None:
    write_report(tmp_path / "r", {"gpus": ["one"]}, run_steps(STEPS))
    as_json, as_text = write_report(tmp_path / "r", {"gpus": ["two"]}, run_steps(STEPS[:1]))
    assert json.loads(as_json.read_text())["machine"] == {"gpus": ["two"]}
    assert "**passed**" in as_text.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]


def test_the_report_as_json_and_text(tmp_path: Path) -> None:
    as_json, as_text = write_report(tmp_path / "new" / "r.1", {"gpus": ["one"]}, run_steps(STEPS))
    assert (as_json.name, as_text.name) == ("r.1.json", "r.1.md")
    document = json.loads(as_json.read_text())
    assert document["passed"] is False
    assert document["machine"] == {"gpus": ["one"]}
    assert [step["outcome"] for step in document["steps"]][:2] == ["passed", "failed"]
    text = as_text.read_text()
    assert "| broken |  | failed | 0.0 | a \\| b |" in text
    for found in ("**not passed**", '"answer": 42', "ValueError", '"found": 3', "second line"):
        assert found in text
