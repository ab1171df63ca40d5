"""Whose kernels run a bundle: what is chosen, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from qwen_aot.errors import BundleError, EngineMismatchError, GenerationError
from qwen_aot.plugins.cpu import build as cpu_build
from qwen_aot.runtime.backends.cpu import kernels
from qwen_aot.runtime.backends.cpu.kernels import (
    INSTRUCTIONS_VARIABLE,
    LIBRARY_VARIABLE,
    OPS_VERSION,
    CpuLibrary,
    Kernels,
    LackingInstructionsError,
    choose_kernels,
    find_library,
    kernels_named,
    kernels_of,
    open_library,
)
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.bundle.load import Bundle, load_bundle
from qwen_aot.runtime.bundle.manifest import FileEntry, IoTensor, KernelGraph
from tests.cpu_kernels import named_kernels, own_kernels
from tests.runtime.toys import ALL_INPUTS, checksum_model, io_tables, make_manifest, with_text_engine, write_bundle

GRAPH = KernelGraph("model.kernels.onnx", OPS_VERSION, "float16")


@pytest.fixture(autouse=True)
def _nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    monkeypatch.delenv(INSTRUCTIONS_VARIABLE, raising=False)


def bundle_with(graph: KernelGraph | None, target: str = "cpu") -> Bundle:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    files = manifest.files if graph is None else {**manifest.files, graph.file: manifest.files["model.onnx"]}
    return Bundle(
        Path("/bundle"), with_text_engine(dataclasses.replace(manifest, files=files, target=target), kernels=graph)
    )


def stub(folder: Path, source: str) -> Path:
    """A library of a few C functions."""
    path, text = folder / "libstub.so", folder / "stub.cpp"
    text.write_text(source)
    subprocess.run([*cpu_build.find_compiler(), "-shared", "-fPIC", str(text), "-o", str(path)], check=True)
    return path


def choose(bundle: Bundle, choice: Kernels) -> tuple[Bundle, CpuLibrary | None]:
    """Where ONNX Runtime takes every library's ops."""
    return choose_kernels(bundle, choice, lambda library: None)


VERSIONED = """
#include <cstdio>
extern "C" int qwen_aot_cpu_version(void) {{ return {version}; }}
extern "C" int qwen_aot_cpu_instructions(char* text, size_t size)
{{ std::snprintf(text, size, "{text}"); return {code}; }}
"""
# As it refuses a second ONNX Runtime in one process; [0] is CreateStatus.
REFUSING = """
#include <cstdint>
struct Base { void* (*const* (*get_api)(uint32_t version))(int32_t code, char const* message); };
extern "C" void* RegisterCustomOps(void*, Base const* base) { return base->get_api(24)[0](1, "not today"); }
"""


# --- names


def test_names() -> None:
    assert [kernels_named(name) for name in (None, "auto", "own", "onnxruntime")] == [
        Kernels.AUTO, Kernels.AUTO, Kernels.OWN, Kernels.ONNXRUNTIME,
    ]  # fmt: skip
    with pytest.raises(GenerationError, match="kernels is 'fast'; accepted: auto, own, onnxruntime"):
        kernels_named("fast")
    with pytest.raises(GenerationError, match="kernels is 'fast'"):
        open_engine(bundle_with(None), kernels="fast")


# --- the library


def test_the_library_of_these_sources_opens() -> None:
    library = open_library(own_kernels())
    assert (library.version, library.path) == (OPS_VERSION, own_kernels())
    assert library.instructions in ("portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "neon", "neon_dot")


def test_what_the_environment_names_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    assert find_library() == tmp_path / "none.so"
    monkeypatch.setenv(LIBRARY_VARIABLE, "")
    monkeypatch.setattr(kernels, "_PACKAGE", tmp_path)
    path = tmp_path / cpu_build.LIBRARY.relative_to(Path(cpu_build.__file__).parents[2])
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_library() == path


def test_what_tests_compile_is_not_where_runtimes_look() -> None:
    """Sources that a test or a mutation changed would run every bundle from then on."""
    places = [cpu_build.LIBRARY, cpu_build.LIBRARY.with_name(f"{cpu_build.FILE_NAME}.made-of")]
    before = [place.stat().st_mtime_ns if place.exists() else None for place in places]
    own_kernels.__wrapped__()
    assert [place.stat().st_mtime_ns if place.exists() else None for place in places] == before
    assert cpu_build.LIBRARY.resolve().parent not in own_kernels().resolve().parents
    with named_kernels() as named:
        assert find_library() == named.resolve() == own_kernels().resolve()


def test_no_library_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "_PACKAGE", tmp_path)
    assert find_library() is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: folder / "none.so",
            "there is no library of own CPU kernels at .*none.so: compile it with `python",
        ),
        (lambda folder: folder, "there is no library of own CPU kernels at"),
        (lambda folder: text(folder), "can't be loaded: .*text.so.* It may be for another processor or another system"),
        (lambda folder: stub(folder, ""), "libstub.so isn't the library of own CPU kernels, or is an older one"),
        (
            lambda folder: stub(folder, VERSIONED.format(version=OPS_VERSION, text="no such CPU", code=1)),
            "run: no such CPU$",
        ),
    ],
    ids=["no file", "a folder", "a text", "another library", "instructions that aren't there"],
)
def test_what_is_no_library(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(EngineMismatchError, match=message):
        open_library(make(tmp_path))


def text(folder: Path) -> Path:
    path = folder / "text.so"
    path.write_text("not a library")
    return path


def test_instructions_of_the_environment() -> None:
    """In processes of their own: a library chooses once."""
    program = (
        "from qwen_aot.runtime.backends.cpu.kernels import require_library\n"
        "try: print(require_library().instructions)\n"
        "except Exception as error: print(error)"
    )
    for named, wanted in (
        ("portable", "portable"),
        ("mmx", "QWEN_AOT_CPU_INSTRUCTIONS is 'mmx'; this CPU has: portable"),
    ):
        environment = {**os.environ, "QWEN_AOT_CPU_INSTRUCTIONS": named, LIBRARY_VARIABLE: str(own_kernels())}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert wanted in run.stdout, run.stderr


# --- the choice


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> CpuLibrary:
    found = CpuLibrary(Path("/lib/own.so"), OPS_VERSION, "avx2")
    monkeypatch.setattr(kernels, "find_library", lambda: found.path)
    monkeypatch.setattr(kernels, "open_library", lambda path: found)
    return found


def test_own_kernels_are_taken_where_bundle_and_machine_have_them(library: CpuLibrary) -> None:
    bundle = bundle_with(GRAPH)
    for choice in (Kernels.AUTO, Kernels.OWN):
        chosen, found = choose(bundle, choice)
        text = chosen.manifest.engines.text
        assert found is library and chosen.engine_path == Path("/bundle/model.kernels.onnx")
        assert (text.cache_dtype, kernels_of(chosen.manifest)) == ("float16", "own")
        for before, after in (
            (bundle.manifest.engines.text.inputs, text.inputs),
            (bundle.manifest.engines.text.outputs, text.outputs),
        ):
            for one, other in zip(before, after, strict=True):
                is_cache = one.name.startswith(("past_key_values.", "present."))
                assert other == (IoTensor(one.name, "float16", one.shape) if is_cache else one)
    chosen, found = choose(bundle, Kernels.ONNXRUNTIME)
    assert chosen is bundle and found is None and kernels_of(chosen.manifest) == "onnxruntime"


def test_scales_of_a_cache_keep_their_type(library: CpuLibrary) -> None:
    cache = (
        IoTensor("past_key_values.0.key", "int8", ("B", 2, "C", 8)),
        IoTensor("past_key_values.0.key_scale", "float16", ("B", 2, "C")),
    )
    bundle = bundle_with(dataclasses.replace(GRAPH, cache_dtype="int8"))
    manifest = with_text_engine(bundle.manifest, inputs=cache, cache_dtype="int8")
    chosen, _ = choose(Bundle(bundle.path, manifest), Kernels.OWN)
    assert chosen.manifest.engines.text.inputs == cache


@pytest.mark.parametrize("instructions", ["portable", "neon", "avx2", "neon_dot"])
def test_instructions_that_are_not_known_to_be_faster(
    instructions: str, library: CpuLibrary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody gets them who didn't ask for them, wherever their library is."""
    found = dataclasses.replace(library, instructions=instructions)
    monkeypatch.setattr(kernels, "open_library", lambda path: found)
    monkeypatch.setenv(LIBRARY_VARIABLE, str(found.path))
    bundle = bundle_with(GRAPH)
    is_slow = instructions in ("portable", "neon")
    with caplog.at_level("DEBUG", logger=kernels.__name__):
        assert choose(bundle, Kernels.AUTO)[1] is (None if is_slow else found)
    assert (f"own ones would use {instructions} here, which isn't known to be faster" in caplog.text) is is_slow
    assert choose(bundle, Kernels.OWN)[1] is found
    monkeypatch.setenv(INSTRUCTIONS_VARIABLE, instructions)
    assert choose(bundle, Kernels.AUTO)[1] is found


@pytest.mark.parametrize(
    ("target", "quantization", "why"),
    [
        ("cpu", {}, "an older version built it, or none of its nodes has such a kernel"),
        ("cpu", {"fast_prefill": True}, "--fast-prefill builds have none"),
        ("cuda", {}, "its target is cuda"),
    ],
)
def test_a_bundle_without_a_graph_for_them(
    target: str, quantization: dict[str, bool], why: str, library: CpuLibrary
) -> None:
    bundle = bundle_with(None, target)
    bundle = Bundle(bundle.path, with_text_engine(bundle.manifest, quantization=quantization))
    assert choose(bundle, Kernels.AUTO) == (bundle, None)
    with pytest.raises(EngineMismatchError, match=f"has no graph for own CPU kernels: {why}. Let kernels be auto"):
        choose(bundle, Kernels.OWN)


@pytest.mark.parametrize(
    ("library_version", "graph_version", "message"),
    [
        (
            OPS_VERSION + 1,
            OPS_VERSION,
            f"has version {OPS_VERSION + 1} of the ops, this qwen-aot has {OPS_VERSION}: compile it with",
        ),
        (
            OPS_VERSION,
            OPS_VERSION + 1,
            f"wants version {OPS_VERSION + 1} of the ops, this qwen-aot has {OPS_VERSION}: build the bundle anew",
        ),
    ],
    ids=["library", "graph"],
)
def test_another_version(
    library_version: int,
    graph_version: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    path = stub(tmp_path, VERSIONED.format(version=library_version, text="avx2", code=0))
    monkeypatch.setattr(kernels, "find_library", lambda: path)
    bundle = bundle_with(dataclasses.replace(GRAPH, version=graph_version))
    with pytest.raises(EngineMismatchError, match=message):
        choose(bundle, Kernels.OWN)
    with caplog.at_level("DEBUG", logger=kernels.__name__):
        assert choose(bundle, Kernels.AUTO) == (bundle, None)
    assert "ONNX Runtime's kernels are used: " in caplog.text


def test_a_machine_without_the_library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kernels, "find_library", lambda: None)
    bundle = bundle_with(GRAPH)
    with pytest.raises(EngineMismatchError, match="this machine has no library of own CPU kernels: compile it with"):
        choose(bundle, Kernels.OWN)
    with caplog.at_level("DEBUG", logger=kernels.__name__):
        assert choose(bundle, Kernels.AUTO) == (bundle, None)
    assert "ONNX Runtime's kernels are used: this machine has no library of own CPU kernels" in caplog.text


def test_a_library_that_the_environment_names_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, "/nowhere/own.so")
    with pytest.raises(EngineMismatchError, match="there is no library of own CPU kernels at /nowhere/"):
        choose(bundle_with(GRAPH), Kernels.AUTO)
    bundle = bundle_with(GRAPH)
    assert choose(bundle, Kernels.ONNXRUNTIME) == (bundle, None)


def test_instructions_that_the_environment_names_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = stub(tmp_path, VERSIONED.format(version=OPS_VERSION, text="this CPU has: portable", code=1))
    monkeypatch.setattr(kernels, "find_library", lambda: path)
    monkeypatch.setenv(INSTRUCTIONS_VARIABLE, "mmx")
    with pytest.raises(LackingInstructionsError, match="own CPU kernels can't run: this CPU has: portable"):
        choose(bundle_with(GRAPH), Kernels.AUTO)


@pytest.mark.parametrize("what", ["no library", "another version", "another graph"])
def test_instructions_that_the_environment_names_are_no_wish_for_own_kernels(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An error is what this CPU lacks, and that alone: as in the C library."""
    version, graph_version = OPS_VERSION + (what == "another version"), OPS_VERSION + (what == "another graph")
    path = stub(tmp_path, VERSIONED.format(version=version, text="this CPU has: portable", code=1))
    monkeypatch.setattr(kernels, "find_library", lambda: None if what == "no library" else path)
    monkeypatch.setenv(INSTRUCTIONS_VARIABLE, "avx2")
    bundle = bundle_with(dataclasses.replace(GRAPH, version=graph_version))
    assert choose(bundle, Kernels.AUTO) == (bundle, None)


def test_a_library_that_onnxruntime_cannot_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that serves another ONNX Runtime in this process, for example."""
    told = VERSIONED.format(version=OPS_VERSION, text="avx2", code=0)
    path = stub(tmp_path, told + REFUSING)
    monkeypatch.setattr(kernels, "find_library", lambda: path)
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    model = checksum_model(inputs, outputs)
    folder = write_bundle(tmp_path / "bundle", model, make_manifest(inputs=inputs, outputs=outputs))
    loaded = load_bundle(folder)
    (folder / GRAPH.file).write_bytes((folder / "model.onnx").read_bytes())
    manifest = with_text_engine(
        dataclasses.replace(
            loaded.manifest, files={**loaded.manifest.files, GRAPH.file: loaded.manifest.files["model.onnx"]}
        ),
        kernels=GRAPH,
    )
    bundle = Bundle(folder, manifest)
    engine = open_engine(bundle, threads=1)
    assert kernels_of(engine.manifest) == "onnxruntime"
    engine.close()
    wanted = "^own CPU kernels can't be used: .*not today.* Let kernels be onnxruntime, whose can$"
    with pytest.raises(EngineMismatchError, match=wanted):
        open_engine(bundle, threads=1, kernels="own")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
    with pytest.raises(EngineMismatchError, match=wanted):
        open_engine(bundle, threads=1)


def test_a_graph_for_them_may_read_listed_files_only(tmp_path: Path) -> None:
    """It is looked at as the other graph is, whoever's kernels will run."""
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    path = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    model = onnx.load(path / "model.onnx")
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "../secrets")
        tensor.ClearField("raw_data")
    (path / GRAPH.file).write_bytes(model.SerializeToString())
    content = (path / GRAPH.file).read_bytes()
    files = {
        **load_bundle(path).manifest.files,
        GRAPH.file: FileEntry(len(content), hashlib.sha256(content).hexdigest()),
    }
    sealed = with_text_engine(dataclasses.replace(load_bundle(path).manifest, files=files), kernels=GRAPH)
    (path / "manifest.json").write_text(sealed.to_json())
    with pytest.raises(BundleError, match=r"model\.kernels\.onnx names the data file '\.\./secrets'"):
        load_bundle(path)
