"""One tiny checkpoint and its fp32 bundle for all CLI tests, and a way to run the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.runtime.cli.main import qwen_aot
from tests.checkpoints import save_tiny
from tests.decisive import save_decisive

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny-model"
    save_tiny(path, with_tokenizer=True)
    return path


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "bundle"
    build_bundle(checkpoint, BuildSpec(precision=Precision.FP32, max_context=256), out)
    return out


@pytest.fixture(scope="session")
def decisive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint without a tokenizer that is sure of what `verify` scores it on, and its fp32 bundle."""
    folder = tmp_path_factory.mktemp("decisive")
    save_decisive(folder / "decisive")
    build_bundle(folder / "decisive", BuildSpec(precision=Precision.FP32, max_context=320), folder / "bundle")
    return folder / "decisive", folder / "bundle"


@pytest.fixture
def run() -> Run:
    """Runs `qwen-aot` with arguments; stdout and stderr apart."""

    def invoke(*arguments: object, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(qwen_aot, [str(argument) for argument in arguments], input=input)

    return invoke
