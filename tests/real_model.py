"""The real trained model that scripts/setup.sh fetches, and its bundles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.gguf_files import smollm2_path
from tests.shared import once
from tests.tools import lacking

ROOT = Path(__file__).parents[1]


def real_model() -> Path:
    """SmolLM2's file; a module that asks for it where it isn't there is skipped."""
    model = smollm2_path()
    if model is None:
        lacking("models/ has no SmolLM2 GGUF; scripts/setup.sh fetches it")
    return model


def qwen_aot(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command as users do."""
    command = [sys.executable, "-m", "qwen_aot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def real_bundle(shared_folder: Path, precision: str, *, max_batch: int = 1) -> Path:
    """A bundle of it for the CPU, built once a session.

    Args:
        shared_folder: of the session.
        precision: of `qwen-aot build`.
        max_batch: rows.
    """

    def make(folder: Path) -> Path:
        rows = ("--max-batch", max_batch) if max_batch > 1 else ()
        result = qwen_aot("build", real_model(), "-o", folder / "bundle", "--precision", precision, *rows)
        assert result.returncode == 0, result.stderr
        return folder / "bundle"

    name = precision if max_batch == 1 else f"{precision}-{max_batch}"
    return once(shared_folder / "real" / name, make)
