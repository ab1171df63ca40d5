"""A build in two steps, prepared on one machine and compiled on another, gives what one step gives."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.compile_prepared import compile_prepared, estimate_of
from qwen_aot.engines.prepare import plan_prepared, prepare_build
from qwen_aot.engines.prepared_folder import read_prepared
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.runtime.bundle.files import PREPARED_NAME
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY, PLUGIN_LIBRARY_VARIABLE
from qwen_aot.version import __version__
from tests.checkpoints import save_tiny
from tests.engines.tensorrt.builder_double import LIBRARY_HEADER, make_module
from tests.engines.tensorrt.test_plugins import FOREIGN_HEADER

ARTEFACTS = {"model.onnx", "model.onnx.data", PREPARED_NAME, PLUGIN_LIBRARY}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_tiny(path, with_tokenizer=True)
    return path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "moe"
    save_tiny(path, layers=1, hidden=128, moe={"moe_intermediate_size": 128})
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "plugins.so"
    path.write_bytes(LIBRARY_HEADER + b"plugins")
    return path


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLUGIN_LIBRARY_VARIABLE, raising=False)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The device's library: that of JetPack 6."""
    module = make_module(version="10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def spec(
    library: Path | None = None, *, precision: str = "fp16", target: str = "tensorrt", **options: Any
) -> BuildSpec:
    return BuildSpec(
        target=Target(target),
        precision=precision,  # type: ignore[arg-type]  # names are taken
        max_context=192,
        prefill_chunk=64,
        max_batch=2,
        tensorrt=TensorRtOptions(plugin_library=library, **options),
    )


def prepare(checkpoint: Path, request: BuildSpec, out: Path) -> Path:
    with open_checkpoint(checkpoint) as opened:
        return prepare_build(opened, request, out).out


@pytest.fixture(scope="module")
def prepared(checkpoint: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test changes."""
    return prepare(checkpoint, spec(library), tmp_path_factory.mktemp("prepared") / "fp16")


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copied"))


def without_reports(manifest: Manifest) -> Manifest:
    files = {name: entry for name, entry in manifest.files.items() if name != "report.json"}
    return dataclasses.replace(manifest, files=files)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("model", ["checkpoint", "mixture"])
def test_two_steps_give_what_one_gives(
    trt: ModuleType, request: pytest.FixtureRequest, library: Path, tmp_path: Path, model: str, precision: str
) -> None:
    source: Path = request.getfixturevalue(model)
    asked = spec(library, precision=precision)
    build_bundle(source, asked, tmp_path / "one")
    one_step = [profile.shapes for profile in trt.Builder.configs[0]._profiles]
    folder = prepare(source, asked, tmp_path / "prepared")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = compile_prepared(folder, tmp_path / "two", {"plugin_library": folder / PLUGIN_LIBRARY})
    one, two = (load_bundle(tmp_path / name).manifest for name in ("one", "two"))
    assert without_reports(one) == without_reports(two) == without_reports(report.manifest)
    assert (tmp_path / "one/engine.plan").read_bytes() == (tmp_path / "two/engine.plan").read_bytes()
    assert one_step == [profile.shapes for profile in trt.Builder.configs[1]._profiles]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # as it was
    assert json.loads((tmp_path / "two/report.json").read_text())["stages"][1]["stage"] == "compile"


def test_preparing_needs_no_tensorrt(monkeypatch: pytest.MonkeyPatch, prepared: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # an import fails
    found = read_prepared(prepared)
    assert {path.name for path in prepared.iterdir()} == ARTEFACTS | {
        name for name in found.manifest.files if name not in ARTEFACTS
    }
    assert found.spec == spec() and found.manifest.target == "tensorrt"
    assert (prepared / "model.onnx.data").stat().st_size >= found.weight_bytes > 0
    for name, entry in found.manifest.files.items():
        assert hashlib.sha256((prepared / name).read_bytes()).hexdigest() == entry.sha256
    with pytest.raises(BuildError, match="needs TensorRT, and it can't be loaded"):
        compile_prepared(prepared, prepared.parent / "bundle")


def test_options_of_the_device(trt: ModuleType, prepared: Path, tmp_path: Path) -> None:
    library = prepared / PLUGIN_LIBRARY
    changes = {"plugin_library": library, "workspace_bytes": 1 << 20, "version_compatible": True}
    compile_prepared(prepared, tmp_path / "bundle", changes)
    (config,) = trt.Builder.configs
    assert config._pools == {"WORKSPACE": 1 << 20} and "VERSION_COMPATIBLE" in config._flags
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert manifest.engines.text.tensorrt is not None and manifest.engines.text.tensorrt.version_compatible


def test_a_library_is_native_code_and_must_be_named(
    trt: ModuleType, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        BuildError, match=f"none is named: name the one of {prepared}, if you trust .*or this machine's own"
    ):
        compile_prepared(prepared, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [] and trt.Builder.configs == []
    own = tmp_path / "own.so"
    own.write_bytes(LIBRARY_HEADER + b"this machine's")
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, str(own))
    compile_prepared(prepared, tmp_path / "bundle")
    assert (tmp_path / "bundle" / PLUGIN_LIBRARY).read_bytes() == own.read_bytes()


def test_a_library_of_another_processor(trt: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(FOREIGN_HEADER + b"plugins")
    folder = prepare(checkpoint, spec(foreign), tmp_path / "prepared")
    assert (folder / PLUGIN_LIBRARY).read_bytes() == foreign.read_bytes()
    with pytest.raises(BuildError, match=r"the plugin library .* is for .*, and this machine is"):
        compile_prepared(folder, tmp_path / "bundle", {"plugin_library": folder / PLUGIN_LIBRARY})


def test_without_plugins(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    folder = prepare(checkpoint, spec(attention="native", moe="native"), tmp_path / "prepared")
    assert not (folder / PLUGIN_LIBRARY).exists()
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(version="10.16.2"))
    compile_prepared(folder, tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "tensorrt", make_module(version="10.3.0"))
    with pytest.raises(BuildError, match=r"TensorRT 10\.3\.0 lacks the layers"):
        compile_prepared(folder, tmp_path / "older")


def test_plugins_that_nobody_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="the plugins of target tensorrt need their library, and none is named"):
        prepare(checkpoint, spec(), tmp_path / "prepared")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_has_nothing_to_compile(checkpoint: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(
        BuildError, match=f"target {target} has nothing to compile.*--prepare is for tensorrt-rtx, tensorrt"
    ):
        prepare(checkpoint, BuildSpec(target=Target(target)), tmp_path / "prepared")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", PLUGIN_LIBRARY])
@pytest.mark.parametrize("how", ["changed", "cut", "missing"])
def test_a_folder_that_was_not_copied_whole(
    trt: ModuleType, copy: Path, library: Path, tmp_path: Path, name: str, how: str
) -> None:
    path = copy / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if how == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BuildError, match=f"{path} .*copy the"):
        compile_prepared(copy, tmp_path / "bundle", {"plugin_library": library})
    assert not (tmp_path / "bundle").exists() and trt.Builder.configs == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "has format_version 2, and this version of qwen-aot reads 1: .*prepared by"),
        ({"qwen_aot": "9.8"}, r"was prepared by qwen-aot 9\.8, and this is .*with the same version"),
        ({"spec.tensorrt.plugin_library": "it.so"}, r"names files of a machine \(plugin_library\); accepted: none"),
        ({"spec.tensorrt.timing_cache": "it.cache"}, r"names files of a machine \(timing_cache\); accepted: none"),
        ({"spec.max_batch": 7}, "its request and its manifest differ in max_batch"),
        ({"weight_bytes": -1}, "weight_bytes is -1; accepted: whole numbers from 0"),
        ({"weight_bytes": True}, "weight_bytes is True"),
        ({"spec": {"target": "tensorrt", "tensorrt": {}, "colour": "red"}}, "its request isn't one of this version"),
        ({"spec": {"target": "tensorrt", "tensorrt": {"colour": "red"}}}, "its request isn't one of this version"),
        ({"spec": {"target": "toaster", "tensorrt": {}}}, "toaster"),
        ({"spec": []}, "its request isn't one of this version"),
        ({"manifest": {}}, "format_version"),
        ({"more": 1}, "unknown keys"),
        (None, "is not JSON"),
    ],
)
def test_a_damaged_description(copy: Path, tmp_path: Path, changes: dict[str, Any] | None, said: str) -> None:
    path = copy / PREPARED_NAME
    document = json.loads(path.read_text())
    for name, value in (changes or {}).items():
        *place, last = name.split(".")
        functools.reduce(operator.getitem, place, document)[last] = value
    path.write_text("{" if changes is None else json.dumps(document))
    with pytest.raises(BuildError, match=said):
        compile_prepared(copy, tmp_path / "bundle")


def test_what_may_be_replaced(checkpoint: Path, library: Path, copy: Path, tmp_path: Path) -> None:
    prepare(checkpoint, spec(library, precision="int8"), copy)  # an earlier prepared build
    assert read_prepared(copy).spec.precision == "int8"
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(BuildError, match=r"holds files that its prepared\.json doesn't list .notes\.txt"):
        prepare(checkpoint, spec(library), copy)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(BuildError, match=f"isn't a prepared build .no {PREPARED_NAME}"):
        prepare(checkpoint, spec(library), tmp_path / "other")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BuildError, match="is a file; give a folder"):
        prepare(checkpoint, spec(library), tmp_path / "file")


def test_sizes_before_anything_is_written(checkpoint: Path, library: Path, prepared: Path, tmp_path: Path) -> None:
    with open_checkpoint(checkpoint) as opened:
        plan = plan_prepared(opened, spec(library), tmp_path / "prepared")
    assert list(tmp_path.iterdir()) == []
    compiling = estimate_of(read_prepared(prepared))
    assert plan.estimate.peak_memory_bytes < compiling.peak_memory_bytes  # what the host needn't have
    assert plan.estimate.disk_bytes == plan.estimate.bundle_bytes >= compiling.bundle_bytes


def test_what_the_host_named_stays_there(checkpoint: Path, library: Path, tmp_path: Path) -> None:
    folder = prepare(checkpoint, spec(library, timing_cache=tmp_path / "cache"), tmp_path / "prepared")
    assert str(tmp_path) not in (folder / PREPARED_NAME).read_text()
    assert read_prepared(folder).spec.tensorrt.timing_cache is None
    assert json.loads((folder / PREPARED_NAME).read_text())["qwen_aot"] == __version__


def test_compiling_imports_nothing_that_reads_checkpoints() -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'onnxscript', 'transformers', 'gguf', 'safetensors', 'triton', 'onnxruntime'):\n"
        "    sys.modules[name] = None\n"
        "import qwen_aot.engines.compile_prepared\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.trt
def test_the_real_compiler_makes_the_same_of_it(checkpoint: Path, tmp_path: Path) -> None:
    asked = spec(target="tensorrt-rtx", precision="int8", compute_capabilities=("8.9",))
    build_bundle(checkpoint, asked, tmp_path / "one")
    folder = prepare(checkpoint, asked, tmp_path / "prepared")
    compile_prepared(folder, tmp_path / "two")
    one, two = (load_bundle(tmp_path / name).manifest for name in ("one", "two"))
    assert one.engines.text.plan is not None and one.engines.text.plan == two.engines.text.plan
    assert one.engines == two.engines
