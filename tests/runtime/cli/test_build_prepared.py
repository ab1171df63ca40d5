"""`build --prepare`, and `build` of what it wrote, on a double of TensorRT 10.3."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_aot.extras import install_command
from qwen_aot.runtime.bundle.files import PREPARED_NAME
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY, PLUGIN_LIBRARY_VARIABLE
from tests.engines.tensorrt.builder_double import LIBRARY_HEADER, make_module
from tests.runtime.cli.conftest import Run

TARGET = ("--target", "tensorrt", "--precision", "int8", "--max-context", 192, "--prefill-chunk", 64)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLUGIN_LIBRARY_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(version="10.3.0"))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "plugins.so"
    path.write_bytes(LIBRARY_HEADER)
    return path


@pytest.fixture
def prepared(run: Run, checkpoint: Path, library: Path, tmp_path: Path) -> Path:
    result = run("build", checkpoint, "-o", tmp_path / "prepared", *TARGET, "--prepare", "--plugin-library", library)
    assert result.exit_code == 0, result.stderr
    assert "tensorrt int8, " in result.stdout and ", prepared in " in result.stdout
    return tmp_path / "prepared"


def test_from_one_machine_to_the_other(run: Run, prepared: Path, tmp_path: Path) -> None:
    result = run("build", prepared, "-o", tmp_path / "bundle", "--plugin-library", prepared / PLUGIN_LIBRARY)
    assert result.exit_code == 0, result.stderr
    assert "[2/4] compile" in result.stderr and ", compiled in " in result.stdout
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert (manifest.target, manifest.max_context, manifest.engines.text.precision) == ("tensorrt", 192, "int8")
    options = ("--json", "--workspace-mib", 64, "--plugin-library", prepared / PLUGIN_LIBRARY)
    report = json.loads(run("build", prepared, "-o", tmp_path / "bundle", *options).stdout)
    assert report["bundle"] == str(tmp_path / "bundle")
    assert [stage["stage"] for stage in report["stages"]] == ["check", "compile", "hash", "check size"]


def test_dry_runs(run: Run, checkpoint: Path, library: Path, prepared: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = ("--prepare", "--plugin-library", library, "--dry-run", "--json")
    planned = json.loads(run("build", checkpoint, "-o", tmp_path / "again", *TARGET, *arguments).stdout)
    on_device = json.loads(run("build", prepared, "-o", tmp_path / "bundle", "--dry-run", "--json").stdout)
    assert planned["peak_memory_bytes"] < on_device["peak_memory_bytes"]  # the compiling is the device's
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--precision", "int4"), "was prepared by another build, which decided --precision; accepted here: --output,"),
        (("--max-batch", 2, "--threads", 1), "which decided --max-batch, --threads;"),
        (("--prepare",), "which decided --prepare;"),
        (
            ("--compute-capability", "8.7"),
            "target tensorrt doesn't take compute_capabilities: it builds for the GPU that it",
        ),
    ],
)
def test_options_that_come_too_late(
    run: Run, prepared: Path, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    result = run("build", prepared, "-o", tmp_path / "bundle", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prepare",), "target cpu has nothing to compile on the device"),
        ((*TARGET, "--prepare", "--verify"), "--prepare goes without --verify and --algorithm"),
        ((*TARGET[:2], "--prepare", "--algorithm", "gptq"), "--prepare goes without --verify and --algorithm"),
    ],
)
def test_what_is_not_prepared(
    run: Run, checkpoint: Path, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    result = run("build", checkpoint, "-o", tmp_path / "prepared", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_it_is_no_bundle(run: Run, prepared: Path) -> None:
    result = run("generate", prepared, "--prompt", "x")
    assert result.exit_code == 1
    assert (
        f"is a build that was prepared, not a bundle: compile it with `build-engine {prepared} -o BUNDLE`"
        in " ".join(result.stderr.split())
    )


def test_a_damaged_folder(run: Run, prepared: Path, tmp_path: Path) -> None:
    (prepared / PREPARED_NAME).write_text("{}")
    result = run("build", prepared, "-o", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "prepared.json" in result.stderr and "Traceback" not in result.stderr


def test_a_device_without_what_compiles(prepared: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['onnx_ir'] = sys.modules['torch'] = None\n"
        "from qwen_aot.runtime.cli.main import build_engine_main; build_engine_main()"
    )
    command = [sys.executable, "-c", script, str(prepared), "-o", str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    wanted = f"needs the package 'onnx_ir', which isn't installed; install it with `{install_command('compile')}`"
    assert wanted in " ".join(done.stderr.split())
