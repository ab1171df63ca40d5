"""docs/python.md: every block runs, in one program, on a tiny bundle; tests/installed/test_types.py checks types."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from tests.checkpoints import save_tiny

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    save_tiny(folder / "tiny", with_tokenizer=True)
    build_bundle(folder / "tiny", BuildSpec(precision=Precision.FP32, max_context=256, max_batch=3), folder / "bundle")
    (folder / "program.py").write_text("\n".join(BLOCKS), encoding="utf-8")
    return folder


def test_the_examples_run(program: Path) -> None:
    assert len(BLOCKS) == PAGE.count("```") // 2 >= 10
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\nimport program",
    ]
    done = subprocess.run(command, cwd=program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "the context holds 256" in done.stdout
    assert done.stdout.count("the request was cancelled with the task") <= 2
