"""What is said about a package that isn't installed, and that the table names extras which bring it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

from qwen_aot import extras
from qwen_aot.extras import EXTRA_OF, how_to_install, install_command, missing_package, obstacle
from qwen_aot.jetson import Jetson

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
            named |= set(
                re.findall(r"(?:install_command|how_to_install)\([\"'](\w+)[\"']", path.read_text(encoding="utf-8"))
            )
    assert {"cpu", "cuda", "plugins"} <= named <= set(known)


ORIN = Jetson("NVIDIA Jetson Orin Nano Developer Kit", "tegra234", (36, 4, 3))
THOR = Jetson("NVIDIA Jetson AGX Thor Developer Kit", "tegra264", (38, 2, 1))
UNTOLD = Jetson("NVIDIA Jetson Orin Nano Developer Kit", "tegra234", None)
XAVIER = Jetson("NVIDIA Jetson AGX Xavier", "tegra194", (35, 4, 1))
OLD = Jetson("NVIDIA Jetson AGX Orin Developer Kit", "tegra234", (36, 3, 0))


@pytest.mark.parametrize(
    ("jetson", "extra", "said"),
    [
        (
            ORIN,
            "tensorrt",
            "JetPack's, for Python 3.10: `sudo apt install python3-libnvinfer`, .*--system-site-packages",
        ),
        (THOR, "tensorrt", "JetPack's, for Python 3.12: "),
        (UNTOLD, "tensorrt", "JetPack's, for the system's Python: "),
        (
            OLD,
            "tensorrt",
            "JetPack 6.0 of this Jetson has TensorRT 8.6, and 10.3 or later is needed: update it to JetPack 6.1",
        ),
        (
            XAVIER,
            "tensorrt",
            "no JetPack for NVIDIA Jetson AGX Xavier has TensorRT 10.3 or later: take an Orin or a Thor",
        ),
        (ORIN, "tensorrt-rtx", "no TensorRT-RTX for Jetsons: take target tensorrt"),
        (ORIN, "cuda", "no onnxruntime-gpu for Jetsons"),
    ],
)
def test_what_pip_cannot_bring_to_a_jetson(
    monkeypatch: pytest.MonkeyPatch, jetson: Jetson, extra: str, said: str
) -> None:
    monkeypatch.setattr(extras, "find_jetson", lambda: jetson)
    found = how_to_install(extra)
    assert re.search(said, found) and "pip install" not in found
    assert obstacle("serve") is None and "pip install" in how_to_install("serve")


def test_what_has_no_wheel_for_an_older_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    assert obstacle("cpu") == (
        "onnxruntime 1.32 has no wheel for Python 3.10: take Python 3.11 or later, the C library, or target tensorrt"
    )
    assert "no wheel for Python 3.10: compile plugins elsewhere" in how_to_install("plugins")
    assert missing_package("it", ModuleNotFoundError("no", name="onnxruntime")).endswith(str(obstacle("cpu")))
    assert obstacle("build") is obstacle("tensorrt") is None
    monkeypatch.setattr(sys, "version_info", (3, 11, 0, "final", 0))
    assert obstacle("cpu") is obstacle("plugins") is None


def brought(extra: str, **environment: str) -> dict[str, str]:
    """What an extra brings there: package -> versions."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]
    found = [Requirement(text) for text in stated]
    return {
        item.name: str(item.specifier) for item in found if item.marker is None or item.marker.evaluate(environment)
    }


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("5.15.148-tegra", {"cuda-bindings": "<13,>=12.6"}),  # JetPack 6
        ("6.8.12-tegra", {"cuda-bindings": ">=12.6"}),  # JetPack 7
        ("5.15.0-119-generic", {"cuda-bindings": ">=12.6", "tensorrt": ">=10.3"}),
        ("6.6.87.2-microsoft-standard-WSL2", {"cuda-bindings": ">=12.6", "tensorrt": ">=10.3"}),
    ],
)
def test_what_the_extra_tensorrt_brings(kernel: str, expected: dict[str, str]) -> None:
    assert brought("tensorrt", platform_release=kernel) == expected


def test_extras_that_an_older_python_cannot_have() -> None:
    assert brought("cpu", python_version="3.10") == {}
    assert brought("cpu", python_version="3.11") == {"onnxruntime": ">=1.32"}
    assert "triton" not in brought("plugins", python_version="3.10", platform_system="Linux")
