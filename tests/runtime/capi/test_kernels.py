"""Which kernels run a bundle for the CPU: what options, environment, bundle and the library of own kernels decide.

The bundle's two graphs differ in the type of their cache, so that logits tell which of them runs. No op of the library
is in either: doubles stand in its place (`src/kernels_double.c`).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.capi.client import CallError, Library, Model
from tests.runtime.capi.engines import ENGINE_MISMATCH, Dialog, NativeEngine
from tests.runtime.capi.native import PROGRAMS, Native, ask, run
from tests.runtime.capi.test_ort import ids, open_bundle, refusal, toy

AUTO, OWN, ONNXRUNTIME = 0, 1, 2
INFO = 20
VARIABLE = "QWEN_AOT_CPU_KERNELS"
INSTRUCTIONS_VARIABLE = "QWEN_AOT_CPU_INSTRUCTIONS"
NAME = "libqwen_aot_cpu.so"
VERSION = 3
PROMPT = ids(*range(1, 30))

Compile = Callable[..., Path]


def add_graph(bundle: Path, graph: Path, **entry: Any) -> Path:
    """Adds a graph for own kernels to a bundle, and what the manifest says of it."""
    content = graph.read_bytes()
    (bundle / "model.kernels.onnx").write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"]["model.kernels.onnx"] = {"bytes": len(content), "sha256": digest}
    said = {"file": "model.kernels.onnx", "version": VERSION, "cache_dtype": "float16"}
    manifest["engines"]["text"]["kernels"] = said | entry
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles of one graph each, and `both` of the two."""
    root = tmp_path_factory.mktemp("toys")
    made = {kind: toy(root / kind, kind) for kind in ("float32", "float16")}
    return made | {"both": add_graph(toy(root / "both", "float32"), made["float16"] / "model.onnx")}


@pytest.fixture(scope="module")
def compile_double(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles the double of the library, with definitions."""

    def compiled(**definitions: int | str) -> Path:
        library = tmp_path_factory.mktemp("double") / NAME
        options = [f"-D{name}={json.dumps(value)}" for name, value in definitions.items()]
        run(["gcc", "-shared", "-fPIC", *options, PROGRAMS / "kernels_double.c", "-o", library])
        return library

    return compiled


@pytest.fixture(scope="module")
def double(compile_double: Compile) -> Path:
    """One that fits."""
    return compile_double(DOUBLE_VERSION=VERSION)


@pytest.fixture(scope="module")
def program(native: Native) -> Path:
    return native.program("engine")


@pytest.fixture
def dialog(program: Path) -> Iterator[Dialog]:
    with Dialog(program, {name: value for name, value in os.environ.items() if name != VARIABLE}) as dialog:
        yield dialog


@pytest.fixture(scope="module")
def logits(program: Path, bundles: dict[str, Path]) -> dict[bool, bytes]:
    """Those of the prompt, by whether own kernels run it: of bundles that have one graph."""
    with Dialog(program) as dialog:
        found = {
            kind: open_bundle(dialog, bundles[kind]).prefill(0, PROMPT).tobytes() for kind in ("float32", "float16")
        }
    assert found["float32"] != found["float16"]
    return {False: found["float32"], True: found["float16"]}


def runs(dialog: Dialog, engine: NativeEngine, logits: dict[bool, bytes]) -> bool:
    """Whether own kernels run it, which its logits and the library say alike."""
    is_own = bool(dialog.want("has_own_kernels")["is_own"])
    assert engine.prefill(0, PROMPT).tobytes() == logits[is_own]
    return is_own


def messages(dialog: Dialog) -> list[tuple[int, str]]:
    return [tuple(each) for each in dialog.want("log")["messages"]]


@pytest.mark.parametrize(("kernels", "is_own"), [(AUTO, True), (OWN, True), (ONNXRUNTIME, False)])
def test_what_is_asked_for(
    dialog: Dialog, bundles: dict[str, Path], double: Path, logits: dict[bool, bytes], kernels: int, is_own: bool
) -> None:
    engine = open_bundle(dialog, bundles["both"], kernels=kernels, cpu_kernels=str(double))
    assert runs(dialog, engine, logits) is is_own
    said = [(INFO, f"own kernels of {double} are used (none)")]
    assert messages(dialog) == (said if is_own else [])


def test_a_step_of_several_rows_after_a_prefill(dialog: Dialog, bundles: dict[str, Path], double: Path) -> None:
    """The cache has the type of the graph that runs: rows, copies and growth are the other bundle's to the bit."""

    def rows(engine: NativeEngine) -> bytes:
        engine.prefill(0, ids(*range(40)))
        engine.prefill(1, ids(3))
        engine.copy_row(0, 2, 17)
        engine.truncate(0, 9)
        return engine.decode(0, ids(5, 6, 7)).tobytes()

    own = rows(open_bundle(dialog, bundles["both"], kernels=OWN, cpu_kernels=str(double)))
    assert own == rows(open_bundle(dialog, bundles["float16"]))


def test_a_bundle_without_a_graph_for_them(dialog: Dialog, bundles: dict[str, Path], double: Path) -> None:
    for kernels in (AUTO, ONNXRUNTIME):
        open_bundle(dialog, bundles["float32"], kernels=kernels, cpu_kernels=str(double))
        assert dialog.want("has_own_kernels")["is_own"] is False
    said = refusal(dialog, bundles["float32"], kernels=OWN, cpu_kernels=str(double))
    assert "the bundle for target 'cpu' has no graph for own CPU kernels. Let kernels be auto or onnxruntime" in said
    assert messages(dialog) == []


def test_a_machine_without_the_library(dialog: Dialog, bundles: dict[str, Path], logits: dict[bool, bytes]) -> None:
    engine = open_bundle(dialog, bundles["both"])
    assert runs(dialog, engine, logits) is False
    why = f"this machine has no library of own CPU kernels: `qwen-aot capi` installs {NAME} beside libqwen_aot.so"
    ((level, said),) = messages(dialog)
    assert level == INFO and said.startswith(f"ONNX Runtime's kernels are used: {why}")
    assert why in refusal(dialog, bundles["both"], kernels=OWN)


@pytest.fixture(scope="module")
def unfit(compile_double: Compile, native: Native, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that own kernels can't be had of, by what is said of each."""
    text = tmp_path_factory.mktemp("text") / NAME
    text.write_text("no library")
    return {
        f"has version {VERSION + 1} of the ops, the bundle's graph wants {VERSION}": compile_double(
            DOUBLE_VERSION=VERSION + 1
        ),
        "own CPU kernels can't be used: not today.": compile_double(DOUBLE_VERSION=VERSION, DOUBLE_REFUSAL="not today"),
        "can't be loaded": text,
        "isn't the library of own CPU kernels, or is an older one; accepted": native.shared(),
    }


def test_a_library_that_does_not_fit_where_it_is_named(
    dialog: Dialog, bundles: dict[str, Path], unfit: dict[str, Path]
) -> None:
    """Whoever names one wants it: nothing takes its place."""
    for message, library in unfit.items():
        for kernels in (AUTO, OWN):
            assert message in refusal(dialog, bundles["both"], kernels=kernels, cpu_kernels=str(library.resolve()))
    assert messages(dialog) == []


def test_a_library_that_does_not_fit_where_none_is_named(
    program: Path,
    bundles: dict[str, Path],
    unfit: dict[str, Path],
    logits: dict[bool, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    shutil.copy(program, tmp_path / "program")
    for message, library in unfit.items():
        shutil.copy(library, tmp_path / NAME)
        with Dialog(tmp_path / "program") as dialog:
            assert message in refusal(dialog, bundles["both"], kernels=OWN)
            assert messages(dialog) == []
            assert runs(dialog, open_bundle(dialog, bundles["both"]), logits) is False
            ((level, said),) = messages(dialog)
            assert level == INFO and said.startswith("ONNX Runtime's kernels are used: ") and message in said


@pytest.mark.parametrize("kernels", [AUTO, OWN])
def test_what_is_named_must_be_there(dialog: Dialog, bundles: dict[str, Path], kernels: int, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.so", tmp_path):
        said = refusal(dialog, bundles["both"], kernels=kernels, cpu_kernels=str(path))
        assert f"there is no library of own CPU kernels at {str(path)!r}; accepted: the full path of a {NAME}" in said
    open_bundle(dialog, bundles["both"], kernels=ONNXRUNTIME, cpu_kernels=str(tmp_path / "nowhere.so"))


@pytest.mark.parametrize("kernels", [AUTO, OWN])
def test_instructions_that_the_cpu_lacks(
    dialog: Dialog, bundles: dict[str, Path], compile_double: Compile, kernels: int
) -> None:
    library = compile_double(
        DOUBLE_VERSION=VERSION, DOUBLE_INSTRUCTIONS="the environment says 'avx512'; this CPU has: avx2"
    )
    said = refusal(dialog, bundles["both"], kernels=kernels, cpu_kernels=str(library))
    assert said == "own CPU kernels can't run: the environment says 'avx512'; this CPU has: avx2"


def test_instructions_that_the_environment_names_are_no_wish_for_own_kernels(
    program: Path, bundles: dict[str, Path], logits: dict[bool, bytes]
) -> None:
    """An error is what this CPU lacks, and that alone: as in the Python runtime."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    with Dialog(program, {**environment, INSTRUCTIONS_VARIABLE: "avx2"}) as dialog:
        assert runs(dialog, open_bundle(dialog, bundles["both"]), logits) is False


@pytest.mark.parametrize("instructions", ["portable", "neon", "avx2", "neon_dot"])
def test_instructions_that_are_not_known_to_be_faster(
    program: Path, bundles: dict[str, Path], compile_double: Compile, logits: dict[bool, bytes], instructions: str
) -> None:
    """Nobody gets them who didn't ask for them, wherever their library is."""
    library = compile_double(DOUBLE_VERSION=VERSION, DOUBLE_USES=instructions)
    environment = {**os.environ, VARIABLE: str(library), INSTRUCTIONS_VARIABLE: ""}
    is_slow = instructions in ("portable", "neon")
    with Dialog(program, environment) as dialog:
        assert runs(dialog, open_bundle(dialog, bundles["both"]), logits) is not is_slow
        ((level, said),) = messages(dialog)
        stock = f"ONNX Runtime's kernels are used: own ones would use {instructions} here, which isn't known to be"
        assert level == INFO and said.startswith(stock) is is_slow
        assert runs(dialog, open_bundle(dialog, bundles["both"], kernels=OWN), logits)
    with Dialog(program, {**environment, INSTRUCTIONS_VARIABLE: instructions}) as dialog:
        assert runs(dialog, open_bundle(dialog, bundles["both"]), logits)


def test_a_name_without_a_folder_is_of_the_current_one(
    program: Path, bundles: dict[str, Path], compile_double: Compile, double: Path, tmp_path: Path
) -> None:
    """The loader alone would look for it among the system's libraries, which have another of this name."""
    other = compile_double(DOUBLE_VERSION=VERSION + 1)
    shutil.copy(double, tmp_path / NAME)
    variables = {**os.environ, VARIABLE: NAME, "LD_LIBRARY_PATH": str(other.parent), "PROGRAM": str(program.resolve())}
    start = tmp_path / "start.sh"
    start.write_text(f'#!/bin/sh\ncd {shlex.quote(str(tmp_path))} && exec "$PROGRAM"\n')
    start.chmod(0o755)
    both = bundles["both"].resolve()
    with Dialog(start, variables) as dialog:
        open_bundle(dialog, both, kernels=OWN)
        open_bundle(dialog, both, kernels=OWN, cpu_kernels=NAME)
        assert messages(dialog) == [(INFO, f"own kernels of ./{NAME} are used (none)")] * 2


def test_the_environment_names_the_library(
    program: Path, bundles: dict[str, Path], compile_double: Compile, double: Path
) -> None:
    other = compile_double(DOUBLE_VERSION=VERSION + 1)
    with Dialog(program, {**os.environ, VARIABLE: str(double)}) as dialog:
        open_bundle(dialog, bundles["both"], kernels=OWN)
        open_bundle(dialog, bundles["both"], kernels=OWN, cpu_kernels="")
        # What the option names goes before it.
        assert "of the ops" in refusal(dialog, bundles["both"], kernels=OWN, cpu_kernels=str(other))
    with Dialog(program, {**os.environ, VARIABLE: ""}) as dialog:  # as good as not there
        assert "this machine has no library" in refusal(dialog, bundles["both"], kernels=OWN)


def test_a_library_beside_the_program(
    program: Path, bundles: dict[str, Path], double: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a program that libqwen_aot.a is linked into, by whatever name and from whatever folder it was started."""
    monkeypatch.delenv(VARIABLE, raising=False)
    place = tmp_path / "a place"
    place.mkdir()
    shutil.copy(program, place / "program")
    shutil.copy(double, place / NAME)
    (tmp_path / "link").symlink_to(place / "program")
    monkeypatch.chdir(tmp_path)
    for started in (place / "program", Path("a place/program"), tmp_path / "link"):
        with Dialog(started) as dialog:
            open_bundle(dialog, bundles["both"], kernels=OWN)
            assert messages(dialog) == [(INFO, f"own kernels of {place / NAME} are used (none)")]


def test_a_library_beside_the_shared_library(
    native: Native, bundles: dict[str, Path], onnxruntime: Path, double: Path, tmp_path: Path
) -> None:
    """It is found where libqwen_aot.so lies, opened by a path from a folder that isn't the current one any more.

    A file of its name in the current folder is nobody's choice.
    """
    place, elsewhere = tmp_path / "lib", tmp_path / "elsewhere"
    for folder in (place, elsewhere):
        folder.mkdir()
    shutil.copy(native.shared(), place / "libqwen_aot.so.1.0")
    (place / "libqwen_aot.so").symlink_to("libqwen_aot.so.1.0")
    code = f"""
import os, sys
from pathlib import Path
os.chdir({str(place)!r})
from tests.runtime.capi.client import Library, Model
library = Library("./libqwen_aot.so")
os.chdir({str(elsewhere)!r})
for _ in range(2):
    with Model(library, Path({str(bundles["both"])!r}), onnxruntime={str(onnxruntime)!r}, threads=1) as model:
        print(model.fact("HAS_OWN_KERNELS"))
"""
    root = Path(__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment["PYTHONPATH"] = f"{root / 'src'}:{root}"

    def facts() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shutil.copy(double, elsewhere / NAME)
    assert facts() == "0\n0\n"
    shutil.copy(double, place / NAME)
    assert facts() == "1\n1\n"


def test_the_options_of_the_interface(
    library: Library, bundles: dict[str, Path], onnxruntime: Path, double: Path
) -> None:
    numbers = [library.number(f"KERNELS_{name}") for name in ("AUTO", "OWN", "ONNXRUNTIME")]
    assert numbers == [AUTO, OWN, ONNXRUNTIME]
    for kernels, is_own in ((AUTO, 1), (OWN, 1), (ONNXRUNTIME, 0)):
        options = {"kernels": kernels, "cpu_kernels": double, "onnxruntime": onnxruntime, "threads": 1}
        with Model(library, bundles["both"], **options) as model:
            assert model.fact("HAS_OWN_KERNELS") == is_own
    chosen = ctypes.c_void_p()
    library.options_create(ctypes.byref(chosen))
    for number in (-1, 3):
        with pytest.raises(CallError, match=rf"kernels is {number}; accepted: one of QWEN_AOT_KERNELS_\*") as caught:
            library.options_set_kernels(chosen, number)
        assert caught.value.name == "INVALID_ARGUMENT"
    library.options_free(chosen)


def test_a_graph_that_is_not_what_the_manifest_says(
    dialog: Dialog, bundles: dict[str, Path], double: Path, tmp_path: Path
) -> None:
    """Its cache has another type than `cache_dtype`: own kernels are no way around the check of a graph."""
    graph = bundles["float16"] / "model.onnx"
    path = add_graph(toy(tmp_path / "bundle", "float32"), graph, cache_dtype="bfloat16")
    said = refusal(dialog, path, cpu_kernels=str(double))
    assert "is of element type 10 with 4 dimensions in the graph, and bfloat16" in said
    open_bundle(dialog, path, kernels=ONNXRUNTIME, cpu_kernels=str(double))


def test_a_graph_for_a_gpu(dialog: Dialog, bundles: dict[str, Path], double: Path, tmp_path: Path) -> None:
    path = shutil.copytree(bundles["float32"], tmp_path / "bundle")
    (path / "model.onnx").rename(path / "model.plan")
    manifest = path / "manifest.json"
    text = manifest.read_text(encoding="utf-8").replace('"model.onnx"', '"model.plan"')
    manifest.write_text(text.replace('"target": "cpu"', '"target": "tensorrt"'), encoding="utf-8")
    answer = dialog.ask("open", bundle=str(path), threads=0, engines=1, kernels=OWN, cpu_kernels=str(double))
    assert answer["status"] == ENGINE_MISMATCH
    assert "the bundle for target 'tensorrt' has no graph for own CPU kernels" in answer["message"]


def test_what_the_graph_for_own_kernels_reads(native: Native, bundles: dict[str, Path], tmp_path: Path) -> None:
    """As of the other graph: files that the manifest lists, whichever kernels will run it."""
    import onnx
    from onnx.external_data_helper import set_external_data

    model = onnx.load(bundles["float16"] / "model.onnx")
    tensor = model.graph.initializer[0]
    set_external_data(tensor, "../secret")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    path = add_graph(toy(tmp_path / "bundle", "float32"), tmp_path / "graph.onnx")
    (answer,) = ask(native.program("bundle"), [{"open": str(path), "hash_limit": None}])
    assert (
        "model.kernels.onnx names the data file '../secret'; accepted: a file that manifest.json lists"
        in answer["message"]
    )


def test_a_child_process_frees_what_its_parent_opened(dialog: Dialog, bundles: dict[str, Path], double: Path) -> None:
    engine = open_bundle(dialog, bundles["both"], engines=2, kernels=OWN, cpu_kernels=str(double), threads=3)
    engine.prefill(0, ids(1, 2, 3))
    assert dialog.want("free_in_child")["exit"] == 7
    engine.decode(0, ids(4))
