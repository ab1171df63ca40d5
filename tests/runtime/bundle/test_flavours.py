"""The table of TensorRT's flavours against what pip installs and what builds write."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomllib

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.targets import Target
from qwen_aot.extras import install_command
from qwen_aot.runtime.bundle.flavours import FLAVOURS, flavour_of

EXTRAS = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("target", FLAVOURS)
def test_the_extra_of_a_target_brings_its_library(target: str) -> None:
    flavour = FLAVOURS[target]
    (requirement,) = [text for text in EXTRAS[target] if text.startswith(f"{flavour.package}>=")]
    assert requirement.removeprefix(f"{flavour.package}>=").startswith(flavour.oldest)
    assert flavour.install == install_command(target)
    assert flavour.install_version.startswith(f"pip install {flavour.package}=={{version}}")


@pytest.mark.parametrize("target", FLAVOURS)
def test_the_engine_that_a_build_writes_is_the_flavours_own(target: str) -> None:
    flavour = flavour_of(BuildSpec(target=Target(target)).facts.engine_file)
    assert flavour is FLAVOURS[target]


@pytest.mark.parametrize("name", ["model.onnx", "engine", "plan", "engine.plan.old"])
def test_other_files_are_no_flavours_engine(name: str) -> None:
    assert flavour_of(name) is None
