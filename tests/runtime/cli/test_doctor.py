"""`doctor` on this machine, and on made-up ones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_aot.extras import install_command
from qwen_aot.jetson import Jetson
from qwen_aot.runtime.backends.cpu.kernels import CpuLibrary
from qwen_aot.runtime.cli import doctor
from qwen_aot.runtime.cli.doctor import Need, gpus, lack
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.cli.conftest import Run


def test_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: 3)
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["targets"]["cpu"] == {"build_lacks": [], "run_lacks": []}  # or these tests could not run
    assert facts["extras"]["torch"]["version"].startswith("2.")
    assert facts["memory"]["available_bytes"] > 0
    assert facts["cpu"]["threads"] == 3


def test_table(run: Run) -> None:
    text = run("doctor").stdout
    assert re.search(r"^cpu build +ready$", text, re.MULTILINE)
    assert "onnxruntime" in text


def test_own_kernels_of_other_sources(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "own.so"
    found = CpuLibrary(library, 1, "avx2")
    monkeypatch.setattr(doctor, "find_library", lambda: library)
    monkeypatch.setattr(doctor, "require_library", lambda: found)
    library.write_text("kernels")
    note = tmp_path / "own.so.made-of"
    for noted, is_stale in ((None, False), ("sources of something else", True)):
        if noted is not None:
            note.write_text(noted)
        assert json.loads(run("doctor", "--json").stdout)["own_kernels"] == {
            "library": str(library), "version": 1, "instructions": "avx2", "is_stale": is_stale, "problem": None,
        }  # fmt: skip
        told = " ".join(run("doctor").stdout.split())
        assert ("compiled of other sources than this package's" in told) is is_stale


def test_own_kernels_that_are_not_taken_by_default(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QWEN_AOT_CPU_INSTRUCTIONS", raising=False)
    monkeypatch.setattr(doctor, "require_library", lambda: CpuLibrary(tmp_path / "own.so", 1, "neon"))
    problem = json.loads(run("doctor", "--json").stdout)["own_kernels"]["problem"]
    assert problem == "ONNX Runtime's are used: own ones would use neon here, which isn't known to be faster"


def test_what_the_tensorrt_targets_lack(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorrt-rtx-cu13": "1.7.1.116", "cuda-bindings": "13.0.1", "tensorrt": "10.2.0"}
    monkeypatch.setattr(doctor, "version", lambda package: installed.get(package, "99"))
    monkeypatch.setattr(doctor, "gpus", lambda: [])
    monkeypatch.setenv("QWEN_AOT_PLUGIN_LIBRARY", sys.executable)
    targets = json.loads(run("doctor", "--json").stdout)["targets"]
    no_gpu = "no NVIDIA GPU or driver"
    assert targets["tensorrt-rtx"] == {"build_lacks": [], "compile_lacks": [], "run_lacks": [no_gpu]}
    upgrade = f"tensorrt is 10.2.0, 10.3 or newer is needed: {install_command('tensorrt', upgrade=True)}"
    lacking = [upgrade, no_gpu]
    assert targets["tensorrt"] == {"build_lacks": lacking, "compile_lacks": lacking, "run_lacks": lacking}
    text = run("doctor").stdout
    assert text.count(install_command("tensorrt", upgrade=True)) == 1  # each remedy once, whoever lacks it
    assert re.search(r"^tensorrt build +lacks tensorrt 10.3 or newer, a GPU$", text, re.MULTILINE)
    monkeypatch.setattr(doctor, "gpus", lambda: [dict.fromkeys(("name", "compute_cap", "driver_version"), "1")])
    assert json.loads(run("doctor", "--json").stdout)["targets"]["tensorrt-rtx"]["run_lacks"] == []


def test_the_plugin_library_that_target_tensorrt_lacks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_plugins() -> dict[str, list[str]]:
        targets = json.loads(run("doctor", "--json").stdout)["targets"]
        return {name: [text for text in row["build_lacks"] if "plugin" in text] for name, row in targets.items()}

    monkeypatch.delenv("QWEN_AOT_PLUGIN_LIBRARY", raising=False)
    (message,) = of_plugins().pop("tensorrt")
    assert "`python -m qwen_aot.plugins.library -o FOLDER`" in message
    assert "QWEN_AOT_PLUGIN_LIBRARY" in message and "--attention native --moe native" in message
    monkeypatch.setenv("QWEN_AOT_PLUGIN_LIBRARY", "/no/such/library.so")
    assert "/no/such/library.so doesn't exist" in of_plugins().pop("tensorrt")[0]
    monkeypatch.setenv("QWEN_AOT_PLUGIN_LIBRARY", str(Path(__file__)))
    assert "isn't a shared library" in of_plugins().pop("tensorrt")[0]
    monkeypatch.setenv("QWEN_AOT_PLUGIN_LIBRARY", sys.executable)
    assert not any(of_plugins().values())


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, f"onnxruntime isn't installed: {install_command('cpu')}"),
        (
            "1.31.1",
            f"onnxruntime is 1.31.1, 1.32 or newer is needed: {install_command('cpu', upgrade=True)}",
        ),
        ("1.32.0", None),
        ("2.0", None),
    ],
)
def test_what_is_lacking(monkeypatch: pytest.MonkeyPatch, found: str | None, message: str | None) -> None:
    monkeypatch.setattr(doctor, "version", lambda package: found)
    lacking = lack(Need("onnxruntime", "cpu", (1, 32)))
    assert (lacking.text if lacking else None) == message


def test_gpus_as_the_driver_lists_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA RTX A4000, 8.6, 16376 MiB, 570.86'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpus() == [
        {
            "name": "NVIDIA RTX A4000",
            "compute_cap": "8.6",
            "memory.total": "16376 MiB",
            "driver_version": "570.86",
        }
    ]
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    tool.write_text("#!/bin/sh\necho 'no driver' >&2; exit 9\n")
    assert gpus() == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpus() == []


@pytest.mark.parametrize("listing", ["Orin (nvgpu), [N/A], [N/A], 540.4.0", None], ids=["a dumb tool", "no tool"])
def test_a_jetsons_gpu_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listing: str | None) -> None:
    if listing is not None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho '{listing}'\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with installed(Gpu(name="Orin", capability=(8, 7), total_bytes=8 << 30)):
        (found,) = gpus()
    assert (found["name"], found["compute_cap"], found["memory.total"]) == ("Orin", "8.7", "8192 MiB")
    with installed(Gpu(driver=0)):
        assert gpus() == []


ORIN = Jetson("NVIDIA Jetson Orin Nano Developer Kit", "tegra234", (36, 4, 3))


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Orin Nano with JetPack 6.2 and nothing of ours but what `doctor` needs."""
    monkeypatch.setattr(doctor, "find_jetson", lambda: ORIN)
    monkeypatch.setattr("qwen_aot.extras.find_jetson", lambda: ORIN)
    monkeypatch.setattr(doctor, "driver_cuda", lambda: (12, 6))
    installed = {"cuda-bindings": "13.4.4", **dict.fromkeys(("torch", "onnx"), "99")}
    monkeypatch.setattr(doctor, "version", installed.get)


@pytest.mark.usefixtures("orin")
def test_bindings_come_by_pip_on_a_jetson_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda package: None)
    for extra in ("tensorrt", "cuda"):
        found = lack(Need("cuda-bindings", extra, (12, 6)))
        assert found is not None and found.remedy == install_command("tensorrt")


@pytest.mark.parametrize("bindings", [None, "12.9.1", "13.0.1"])
def test_a_driver_that_runs_no_bindings_of_a_target_is_updated(
    monkeypatch: pytest.MonkeyPatch, bindings: str | None
) -> None:
    monkeypatch.setattr(doctor, "driver_cuda", lambda: (12, 8))
    monkeypatch.setattr(doctor, "version", lambda package: bindings)
    found = lack(Need("cuda-bindings", "tensorrt-rtx", (13,)))
    assert found is not None and found.remedy == "update the driver to one of CUDA 13 (580 or later)"


@pytest.mark.usefixtures("orin")
def test_a_jetson(run: Run) -> None:
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["jetson"] == {
        "model": "NVIDIA Jetson Orin Nano Developer Kit",
        "chip": "tegra234",
        "jetson_linux": "36.4.3",
        "jetpack": "6.1 or 6.2",
    }
    lacking = facts["targets"]["tensorrt"]["run_lacks"]
    assert lacking[0].startswith("tensorrt isn't installed: on a Jetson it is JetPack's, for Python 3.10: `sudo apt")
    assert lacking[1] == "cuda-bindings is 13.4.4, and the driver runs CUDA 12.6: pip install 'cuda-bindings==12.*'"
    assert not any("pip install 'tensorrt" in text for text in lacking)
    text = run("doctor").stdout
    assert re.search(r"^board +NVIDIA Jetson Orin Nano Developer Kit, Jetson Linux 36.4.3", text, re.MULTILINE)
    assert "there is no TensorRT-RTX for Jetsons: take target tensorrt" in " ".join(text.split())


def test_elsewhere_no_board_is_shown(run: Run) -> None:
    assert json.loads(run("doctor", "--json").stdout)["jetson"] is None
    assert not re.search(r"^board ", run("doctor").stdout, re.MULTILINE)


def test_tensorrt_that_pip_knows_nothing_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "version", not_found)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    assert doctor.version("tensorrt") == "10.3.0"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert doctor.version("tensorrt") is None
    assert doctor.version("click") is None  # of others only pip is asked


def not_found(package: str) -> str:
    raise doctor.importlib.metadata.PackageNotFoundError(package)


@pytest.mark.parametrize(
    ("driver", "bindings", "is_lacking"),
    [((12, 6), "13.0.1", True), ((12, 6), "12.9.10", False), ((13, 2), "13.4.4", False), (None, "13.0.1", False)],
)
def test_bindings_newer_than_the_driver(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int] | None, bindings: str, is_lacking: bool
) -> None:
    monkeypatch.setattr(doctor, "driver_cuda", lambda: driver)
    monkeypatch.setattr(doctor, "version", lambda package: bindings)
    found = lack(Need("cuda-bindings", "tensorrt", (12, 6)))
    assert (found is not None) == is_lacking


def test_a_device_compiles_without_what_reads_checkpoints(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"tensorrt": "10.3.0", "onnx": "1.23.2", "onnx-ir": "1.1.0", "ml-dtypes": "0.6.0"}
    monkeypatch.setattr(doctor, "version", installed.get)
    monkeypatch.setattr(doctor, "gpus", lambda: [dict.fromkeys(("name", "compute_cap", "driver_version"), "1")])
    monkeypatch.setenv("QWEN_AOT_PLUGIN_LIBRARY", sys.executable)
    targets = json.loads(run("doctor", "--json").stdout)["targets"]
    assert targets["tensorrt"]["compile_lacks"] == [] != targets["tensorrt"]["build_lacks"]
    assert "compile_lacks" not in targets["cpu"]
    assert re.search(r"^tensorrt compile +ready$", run("doctor").stdout, re.MULTILINE)
