"""What is said about a package that isn't installed, and that the table names extras which bring it."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from qwen_aot import extras
from qwen_aot.extras import EXTRA_OF, install_command, missing_package

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", ["torch", "torch.nn.functional"])
def test_the_extra_is_named(module: str) -> None:
    message = missing_package("qwen_aot.build_bundle", ModuleNotFoundError("no", name=module))
    assert message == (
        "qwen_aot.build_bundle needs the package 'torch', which isn't installed; install it with "
        f"`{install_command('build')}`"
    )


@pytest.mark.parametrize("module", ["qwen_aot.engines.nothing", "torchvision", None])
def test_what_no_extra_brings_is_our_bug(module: str | None) -> None:
    error = ModuleNotFoundError("no", name=module)
    with pytest.raises(ModuleNotFoundError) as raised:
        missing_package("it", error)
    assert raised.value is error


# Where the import has another name.
DISTRIBUTIONS = {"PIL": "pillow", "cuda": "cuda-bindings", "tensorrt_rtx": "tensorrt-rtx-cu13"}


@pytest.mark.parametrize("package", EXTRA_OF)
def test_the_named_extra_brings_the_package(package: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {re.split(r"[^\w-]", requirement)[0] for requirement in extras[EXTRA_OF[package]]}
    assert DISTRIBUTIONS.get(package, package.replace("_", "-")) in brought


def test_in_a_clone_the_command_installs_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv/bin/python"))
    monkeypatch.chdir(ROOT)
    assert install_command("build", "cpu") == ".venv/bin/python -m pip install -e '.[build,cpu]'"
    assert install_command("cpu", upgrade=True) == ".venv/bin/python -m pip install -e '.[cpu]' --upgrade"
    monkeypatch.chdir(tmp_path)
    assert install_command("cpu") == f"{ROOT}/.venv/bin/python -m pip install -e '{ROOT}[cpu]'"
    monkeypatch.setattr(sys, "executable", "/opt/my python/bin/python")
    assert shlex.split(install_command("cpu"))[0] == "/opt/my python/bin/python"


def test_in_a_wheel_the_command_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As tests/installed shows of a real one."""
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "lib/python3.11/site-packages/qwen_aot/extras.py"))
    assert install_command("verify") == "pip install 'qwen-aot[verify]'"
    assert install_command("cuda", upgrade=True) == "pip install 'qwen-aot[cuda]' --upgrade"


def test_no_message_writes_the_command_itself() -> None:
    """One place decides how it reads: everything else asks it."""
    folders = [ROOT / name for name in ("exporter", "engines", "runtime", "plugins", "src/qwen_aot")]
    sources = [path for folder in folders for path in folder.rglob("*.py") if path.name != "extras.py"]
    assert len(sources) > 100
    assert [path for path in sources if "qwen-aot[" in path.read_text(encoding="utf-8")] == []


def test_the_command_names_extras_that_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set()
    for folder in ("exporter", "engines", "runtime", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"install_command\([\"'](\w+)[\"']", path.read_text(encoding="utf-8")))
    assert {"cpu", "cuda", "plugins"} <= named <= set(known)
