"""A bundle with a tokenizer for the examples of other engines, and where their packages are."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from tests.checkpoints import save_tiny
from tests.shared import once
from tests.tools import require_tool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def bundle(shared_folder: Path) -> Path:
    """A tiny model, four rows, fp32."""

    def make(folder: Path) -> Path:
        save_tiny(folder / "tiny", with_tokenizer=True)
        build_bundle(
            folder / "tiny", BuildSpec(precision=Precision.FP32, max_context=512, max_batch=4), folder / "bundle"
        )
        return folder / "bundle"

    return once(shared_folder / "examples_bundle", make)


def other_python(program: str) -> str:
    """The Python of the environment that has Ray and Dynamo, told by one of its programs."""
    found = require_tool(
        program,
        remedy=".ci/deep installs it into .venv/distributed",
        path=str(ROOT / ".venv" / "distributed" / "bin"),
    )
    return str(Path(found).parent / "python")
