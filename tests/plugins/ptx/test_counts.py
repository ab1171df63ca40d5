"""The table of what launches execute: its numbers, its command, and that the page has it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.ptx import counts
from tests.plugins.ptx.interpreter import Interpreter
from tests.plugins.ptx.steps import CompiledSteps

if not IS_INTERPRETED:
    pytest.skip("PTX is executed on the CPU only", allow_module_level=True)

ROOT = Path(__file__).parents[3]
SM = "8.9"


@pytest.fixture(scope="module")
def compiled(plugin_build: Path, interpreter: Interpreter) -> CompiledSteps:
    return CompiledSteps(interpreter, plugin_build / "build" / "kernels" / "sm_89")


def documented() -> str:
    text = (ROOT / "docs" / "plugins.md").read_text()
    found = re.search(rf"<!-- table: counts on SM {SM} -->\n\n(.*?)\n\n<!-- end -->", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_documented_decode_step(compiled: CompiledSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the page's rows is that of these kernels; and its bytes are the step's."""
    step = "decode over 512, five heads a group"
    monkeypatch.setattr(counts, "STEPS", {step: counts.STEPS[step]})
    header, rule, row = counts.table(compiled, SM).splitlines()
    assert documented().splitlines()[:2] == [header, rule] and row in documented()
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    cache, query, mma_slots = 2 * 512 * 128 * 2, 5 * 128 * 2, 8
    lengths = int(cells["in sectors"].replace(",", "")) - cache - query
    assert 0 < lengths <= 2 * 2 * 32 * 32  # one sector of each length for each of the blocks' warps
    assert int(cells["`mma`"].replace(",", "")) == 2 * 512 // mma_slots * 128 // 16  # scores, and weights times values


@pytest.mark.deep
def test_the_page_has_the_table(compiled: CompiledSteps) -> None:
    assert counts.table(compiled, SM) == documented()


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.plugins.ptx.counts", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_another_folder(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path} isn't a folder sm_NN that qwen_aot.plugins.aot wrote\n"


def test_help_has_two_examples_of_eighty_columns() -> None:
    done = run("--help")
    examples = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("python -m")]
    assert done.returncode == 0 and len(examples) == 2 and max(map(len, examples)) <= 80
