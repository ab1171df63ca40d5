"""Native code of a bundle runs only where it is this machine's own, or allowed by name: in every form, on doubles."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.backends.tensorrt.bundle_code import BundleCode, bundle_code
from qwen_aot.runtime.bundle.load import Bundle, load_bundle
from qwen_aot.runtime.bundle.manifest import PluginFacts, TensorRtFacts
from qwen_aot.runtime.generation.generator import Generator
from tests.doubles.bundles import PLUGIN_CONTENT, PLUGIN_LIBRARY
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.backends.tensorrt.engines import install_plugin_library, write_checksum_bundle
from tests.runtime.toys import with_text_engine

ALLOW = "QWEN_AOT_ALLOW_BUNDLE_CODE"
SHA256 = hashlib.sha256(PLUGIN_CONTENT.encode()).hexdigest()
ALLOWED: list[tuple[Mapping[str, bool], Mapping[str, str]]] = [
    ({"allow_bundle_code": True}, {}),
    ({}, {ALLOW: "1"}),
]
REFUSED = ["", "0", "2", "true", "yes"]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ALLOW, "QWEN_AOT_PLUGIN_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Brings the plugin library as a file."""
    return write_checksum_bundle(tmp_path / "bundle", plugins=True)


def lean_bundle(folder: Path, **facts: Any) -> Path:
    """Carries TensorRT's lean runtime inside the engine, and no plugins; `facts`: what the manifest says of it."""
    return write_checksum_bundle(folder, host_code="", facts={"version_compatible": True, **facts})


def copy_bundle(folder: Path) -> Path:
    """Carries the plugin library inside the engine too, as a version-compatible build does."""
    plugins = PluginFacts(PLUGIN_LIBRARY, SHA256, in_engine=True, ops=("QwenGQA",))
    facts = {"version_compatible": True, "plugins": plugins}
    return write_checksum_bundle(folder, plugins=True, host_code=PLUGIN_CONTENT, facts=facts)


def refused(bundle: Path | Bundle, message: str, gpu: Gpu | None = None, **options: bool) -> None:
    """Nothing of the bundle or of TensorRT has run when the refusal comes."""
    loaded = load_bundle(bundle) if isinstance(bundle, Path) else bundle
    with installed(gpu or Gpu()) as device:
        with pytest.raises(EngineMismatchError, match=message):
            open_engine(loaded, **options)
        assert device.libraries == []
        assert device.calls["deserialize_cuda_engine"] == device.calls["engine's host code"] == 0


def ran(bundle: Path | Bundle, **options: bool) -> tuple[list[Path], int]:
    """Opens it: the libraries that were loaded, and how often the engine's own code ran."""
    loaded = load_bundle(bundle) if isinstance(bundle, Path) else bundle
    with installed(Gpu()) as device, open_engine(loaded, **options):
        return device.libraries, device.calls["engine's host code"]


def test_a_library_that_is_not_this_machines_own(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = r"none installed \(QWEN_AOT_PLUGIN_LIBRARY names none\)"
    refused(bundle, rf"(?s)plugin library {bundle / PLUGIN_LIBRARY};.*: {SHA256}\n.*: {nothing}\n")
    monkeypatch.setenv("QWEN_AOT_PLUGIN_LIBRARY", str(tmp_path / "none.so"))
    refused(bundle, rf"none installed \(QWEN_AOT_PLUGIN_LIBRARY names {tmp_path / 'none.so'}: No such file")
    install_plugin_library(tmp_path / "own.so", monkeypatch, "what plugins were")
    other = hashlib.sha256(b"what plugins were").hexdigest()
    refused(bundle, rf"(?s): {SHA256}\n.*: {other}\n.*--allow-bundle-code, {ALLOW}=1, or allow_bundle_code=True")


def test_this_machines_own_library_is_loaded_and_not_the_bundles(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = install_plugin_library(tmp_path / "own.so", monkeypatch)
    assert ran(bundle) == ([own], 0)
    assert ran(bundle, allow_bundle_code=True) == ([own], 0)  # allowed, and still needless


def test_a_bundle_exchanged_after_the_look_brings_nothing_in(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = install_plugin_library(tmp_path / "own.so", monkeypatch)
    loaded = load_bundle(bundle)
    facts = loaded.manifest.engines.text.tensorrt
    assert facts is not None
    code = bundle_code(loaded, facts, is_allowed=False)
    (bundle / PLUGIN_LIBRARY).write_text("evil")
    assert code == BundleCode(plugin_library=own)


@pytest.mark.parametrize(("options", "environment"), ALLOWED, ids=["argument", "environment"])
def test_an_allowed_library(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, options: Mapping[str, bool], environment: Mapping[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ran(bundle, **options) == ([bundle / PLUGIN_LIBRARY], 0)


@pytest.mark.parametrize("value", REFUSED)
def test_another_value_of_the_variable_allows_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(ALLOW, value)
    remark = rf" \(the variable is '{value}'; accepted: 1\)" if value else ""
    refused(bundle, rf"{ALLOW}=1{remark}, or allow_bundle_code=True")
    refused(lean_bundle(tmp_path / "lean"), rf"{ALLOW}=1{remark}, or allow")


def test_a_changed_library_is_not_loaded_though_its_hash_was_skipped(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin_library(tmp_path / "own.so", monkeypatch)
    loaded = load_bundle(bundle, skip_hash_above=1)
    library = bundle / PLUGIN_LIBRARY
    library.write_text(PLUGIN_CONTENT.upper())
    for allowed in (False, True):
        changed = r"has the SHA-256 .*, and the engine was built with .*: copy the bundle again"
        refused(loaded, changed, allow_bundle_code=allowed)
    library.unlink()
    refused(loaded, r"libqwen_aot_plugins\.so can't be read \(No such file or directory\): copy the whole bundle")


def test_a_library_that_tensorrt_refuses(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin_library(tmp_path / "own.so", monkeypatch)
    gpu = Gpu()
    gpu.fail("load_library")
    refused(bundle, r"can't load the plugin library .*own\.so: the double was told to fail: load_library\. Reb", gpu)


def test_a_copy_inside_the_engine_is_never_this_machines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else lies beside an honest copy can't be seen: so the same hash isn't enough here."""
    bundle = copy_bundle(tmp_path / "bundle")
    install_plugin_library(tmp_path / "own.so", monkeypatch)
    message = rf"(?s)inside the engine .*engine\.plan: a copy of the plugin.*: {SHA256} \(so the man.*: {SHA256}\n"
    refused(bundle, message)
    assert ran(bundle, allow_bundle_code=True) == ([], 1)


def test_the_lean_runtime_of_a_version_compatible_engine(tmp_path: Path) -> None:
    bundle = lean_bundle(tmp_path / "bundle")
    sha256 = load_bundle(bundle).manifest.files["engine.plan"].sha256
    message = rf"(?s)engine\.plan: TensorRT's lean runtime; .*--version-compatible has none.*: {sha256} \(the eng"
    refused(bundle, message)
    assert ran(bundle, allow_bundle_code=True) == ([], 1)


def test_a_version_compatible_engine_with_its_library_beside_it(tmp_path: Path) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle", plugins=True, host_code="", facts={"version_compatible": True})
    refused(bundle, "lean runtime")
    assert ran(bundle, allow_bundle_code=True) == ([bundle / PLUGIN_LIBRARY], 1)


def facts_of(bundle: Bundle, **changes: Any) -> Bundle:
    facts = bundle.manifest.engines.text.tensorrt
    assert isinstance(facts, TensorRtFacts)
    return replace(bundle, manifest=with_text_engine(bundle.manifest, tensorrt=replace(facts, **changes)))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_manifest_that_keeps_silent_about_the_engines_code(tmp_path: Path, allowed: bool) -> None:
    """TensorRT itself then refuses: it is told nothing that would let it run."""
    silent = lean_bundle(tmp_path / "bundle", version_compatible=False)
    with installed(Gpu()) as gpu, pytest.raises(EngineMismatchError, match="has code for the host, which isn't allow"):
        open_engine(load_bundle(silent), allow_bundle_code=allowed)
    assert gpu.calls["engine's host code"] == 0


def test_a_manifest_that_claims_a_copy_for_an_engine_without_host_code(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    facts = loaded.manifest.engines.text.tensorrt
    assert facts is not None and facts.plugins is not None
    claimed = facts_of(loaded, plugins=replace(facts.plugins, in_engine=True))
    refused(claimed, "a copy of the plugin library")
    with installed(Gpu()) as gpu, pytest.raises(EngineMismatchError, match="Cannot find plugin"):
        open_engine(claimed, allow_bundle_code=True)
    assert gpu.libraries == []


@pytest.fixture
def no_code(tmp_path: Path) -> Iterator[Path]:
    yield write_checksum_bundle(tmp_path / "plain")


def test_a_bundle_without_code_asks_for_nothing(no_code: Path) -> None:
    assert ran(no_code) == ([], 0)


def test_the_generator_passes_the_leave_on(bundle: Path) -> None:
    with installed(Gpu()) as gpu:
        with pytest.raises(EngineMismatchError, match="brings native code"):
            Generator.open(bundle)
        with Generator.open(bundle, allow_bundle_code=True):
            assert gpu.libraries == [bundle / PLUGIN_LIBRARY]
