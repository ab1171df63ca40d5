"""The C library's engine over TensorRT, with the library and CUDA's driver played by doubles.

The double computes the checksum model, so the Python engine's cases tell whether ids, rows, windows and the cache are
right; that TensorRT itself computes what it should is not told here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_aot.errors import BuildError, GenerationError
from qwen_aot.plugins.library import tensorrt_headers
from qwen_aot.runtime.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    IoTensor,
    Manifest,
    PluginFacts,
    TextFiles,
    cache_capacity,
)
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from tests.doubles.bundles import facts_for
from tests.runtime.backends import test_rotary_tables as rotary
from tests.runtime.backends.ort import test_engine as cases
from tests.runtime.capi.engines import BUNDLE, ENGINE_FAILED, ENGINE_MISMATCH, NO_TYPES, UNSUPPORTED, NativeEngine
from tests.runtime.capi.gpu_doubles import NOTHING, GpuDialog, build_double, tensorrt_stubs
from tests.runtime.capi.native import SOURCES, Native
from tests.runtime.toys import ALL_INPUTS, VOCAB_SIZE, checksum, io_tables, make_manifest

ROWS, CONTEXT, CHUNK, POISON = 4, 1000, 8, 207
CAPACITY = cache_capacity(CONTEXT, CHUNK)
VERSION = "10.14.1.48"
INPUTS = {
    "all": ALL_INPUTS,
    "few": ("input_ids", "cache_length", "new_tokens"),  # a plugin follows the lengths
    "speculating": (*ALL_INPUTS, "logits_positions"),  # which this library decodes plainly
    "rotary": rotary.NAMES,
}
# Cache (2), scratch, positions, and inputs and logits of both kinds of step; the same without scratch page-locked.
HELD = "contexts 1 current 0 device {} pinned 5 streams 1 graphs 0 executables {}"
DEVICE = {"all": 8, "few": 8, "speculating": 10, "rotary": 8}  # last_logits of both


@pytest.fixture(scope="module")
def headers(native_folder: Path) -> Path:
    try:
        return tensorrt_headers(native_folder / "tensorrt")
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def driver(native_folder: Path) -> Path:
    return build_double(native_folder / "doubles", "cuda_double", flags=("-Wl,-soname,libcuda.so.1",))


@pytest.fixture(scope="module")
def library(native_folder: Path, headers: Path) -> Path:
    folder = native_folder / "doubles"
    folder.mkdir(parents=True, exist_ok=True)
    stubs = tensorrt_stubs(headers)
    if not (folder / "tensorrt_stubs.h").exists() or (folder / "tensorrt_stubs.h").read_text() != stubs:
        (folder / "tensorrt_stubs.h").write_text(stubs)
    return build_double(folder, "tensorrt_double", flags=(*_includes(headers), f"-I{folder}"))


@pytest.fixture(scope="module")
def program(native: Native, headers: Path) -> Path:
    return tensorrt_program(native, headers)


def tensorrt_program(native: Native, headers: Path) -> Path:
    names = ("open", "tensorrt_backend", "tensorrt_library", "tensorrt_step")
    sources = [str(SOURCES / "src" / "engine" / f"{name}.cpp") for name in names]
    flags = (*NO_TYPES, "-DQWEN_AOT_TENSORRT=1", *_includes(headers))
    return native.program("engine_tensorrt", sources=sources, flags=flags)


def _includes(headers: Path) -> tuple[str, ...]:
    return (f"-isystem{headers}", f"-isystem{SOURCES / 'src' / 'engine' / 'cuda'}")


def plan_of(manifest: Manifest, lines: Sequence[str] = (), **sizes: tuple[int, int]) -> str:
    """An engine of the double for a manifest's tables."""
    engine = manifest.engines.text
    ranges = {
        "prefill": {"B": (1, 1), "S": (1, manifest.prefill_chunk), "W": (1, CAPACITY), "T": (1, 1), **sizes},
        "decode": {"B": (1, manifest.max_batch), "S": (1, 1), "W": (1, CAPACITY), "T": (1, 1), **sizes},
        "verify": {"B": (1, manifest.max_batch), "S": (2, 4), "W": (1, CAPACITY), "T": (2, 4), **sizes},
    }

    def shape(tensor: IoTensor) -> str:
        return " ".join(str(size if isinstance(size, int) else -1) for size in tensor.shape)

    text = ["plan of a double", "activations 4096", f"vocab {manifest.model.vocab_size}"]
    text += [f"tensor {tensor.name} input {tensor.dtype} {shape(tensor)}" for tensor in engine.inputs]
    text += [f"tensor {tensor.name} output {tensor.dtype} {shape(tensor)}" for tensor in engine.outputs]
    for index, profile in enumerate(engine.profiles):
        for tensor in engine.inputs:
            ends = [
                size if isinstance(size, int) else ranges[profile.name][size][end]
                for end in (0, 1)
                for size in tensor.shape
            ]
            text.append(f"profile {index} {tensor.name} {' '.join(map(str, ends))}")
    return "\n".join([*text, *lines]) + "\n"


def make_bundle(
    folder: Path,
    inputs: str = "all",
    *,
    lines: Sequence[str] = (f"poison {POISON}",),
    plan: Callable[[str], str] = lambda text: text,
    files: Mapping[str, bytes] | None = None,
    change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    **facts: Any,
) -> Path:
    """Writes a bundle: `plan` changes the engine, `change` and `facts` what the manifest says of it."""
    tables = io_tables(INPUTS[inputs], "float32", CAPACITY)
    logits_rows = 4 if inputs == "speculating" else None
    toy = make_manifest(
        inputs=tables[0], outputs=tables[1], max_context=CONTEXT, prefill_chunk=CHUNK, logits_rows=logits_rows
    )
    contents = {"engine.plan": plan(plan_of(toy, lines, **(sizes or {}))).encode(), **(files or {})}
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    entries = {name: FileEntry(len(text), hashlib.sha256(text).hexdigest()) for name, text in contents.items()}
    told = facts_for("tensorrt", toy, **{"version": VERSION, "builder_activation_bytes": 4096, **facts})
    text = dataclasses.replace(toy.engines.text, file="engine.plan", tensorrt=told)
    engines = dataclasses.replace(toy.engines, text=text)
    texts = TextFiles(None, None, None)
    manifest = dataclasses.replace(toy, target="tensorrt", engines=engines, files=entries, text=texts)
    (folder / MANIFEST_NAME).write_text(change(manifest).to_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tensorrt")
    return {inputs: make_bundle(root / inputs, inputs) for inputs in INPUTS}


@pytest.fixture(scope="module")
def dialogs(program: Path, driver: Path) -> Callable[..., GpuDialog]:
    return lambda **environment: GpuDialog(program, driver, environment)


@pytest.fixture
def dialog(dialogs: Callable[..., GpuDialog]) -> Iterator[GpuDialog]:
    with dialogs() as dialog:
        yield dialog
        dialog.want("close")
        assert dialog.held() == NOTHING


def open_engine(dialog: GpuDialog, bundle: Path, library: Path, engines: int = 1) -> NativeEngine:
    answer = dialog.open(bundle, tensorrt=str(library), engines=engines)
    assert answer["status"] == 0, answer
    return NativeEngine(dialog, ROWS, VOCAB_SIZE)


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int64)


@pytest.mark.parametrize(
    "case",
    [
        *(
            lambda engine, first=first: rotary.test_a_prompts_length_chooses_its_table(engine, first)
            for first in (20, 21)
        ),
        rotary.test_a_part_of_a_prompt_is_told_of_the_rest,
        rotary.test_rows_keep_theirs_through_steps_of_others,
        rotary.test_what_is_left_of_a_row_keeps_its_table_and_an_empty_row_has_none,
        rotary.test_a_copy_has_its_sources_table,
    ],
)
def test_rows_have_rotary_tables_of_their_own(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path, case: Callable[[Any], None]
) -> None:
    case(open_engine(dialog, bundles["rotary"], library))


@pytest.mark.parametrize("inputs", [name for name in INPUTS if name != "rotary"])
@pytest.mark.parametrize(
    "case",
    [
        cases.test_prefill_and_decode_continue_one_sequence,
        cases.test_rows_of_unequal_length_decode_together,
        cases.test_a_range_of_rows_leaves_the_others_alone,
        cases.test_truncate_forgets_the_end,
        cases.test_a_full_context_is_refused_and_nothing_is_written,
        cases.test_unknown_ids_and_empty_prompts_are_refused,
        lambda engine: cases.test_prefill_in_every_split_is_the_same(engine, 9),
        *(lambda engine, held=held: cases.test_idle_rows_do_not_move(engine, held) for held in (0, 3)),
    ],
)
def test_the_cases_of_the_python_engine(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path, inputs: str, case: Callable[[Any], None]
) -> None:
    engine = open_engine(dialog, bundles[inputs], library)
    assert dialog.held() == HELD.format(DEVICE[inputs], 0)
    case(engine)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_of_calls(dialog: GpuDialog, bundles: dict[str, Path], library: Path, data: st.DataObject) -> None:
    engine = open_engine(dialog, bundles["all"], library)
    rows: list[list[int]] = [[] for _ in range(ROWS)]
    tokens = st.integers(0, VOCAB_SIZE - 1).filter(lambda token_id: token_id != POISON)
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["prefill", "decode", "truncate", "copy", "poison"]))
        row = data.draw(st.integers(0, ROWS - 1))
        if action == "prefill":
            new = data.draw(st.lists(tokens, min_size=1, max_size=30))
            rows[row] += new
            assert engine.prefill(row, ids(*new)).argmax() == checksum(rows[row])
        elif action == "truncate":
            length = data.draw(st.integers(0, len(rows[row])))
            engine.truncate(row, length)
            del rows[row][length:]
        elif action == "copy":
            length = data.draw(st.integers(0, len(rows[row])))
            engine.copy_row(row, (row + 1) % ROWS, length)
            rows[(row + 1) % ROWS] = rows[row][:length]
        elif action == "poison":  # what it wrote must be gone: 0 x NaN is NaN
            with pytest.raises(NonFiniteLogitsError):
                engine.prefill(row, ids(1, 2, POISON))
        else:
            step = data.draw(st.lists(st.just(-1) | tokens, min_size=1, max_size=ROWS - row))
            for _ in range(data.draw(st.integers(1, 4))):  # a shape that comes again is captured, and then launched
                logits = engine.decode(row, ids(*step))
                for offset, token_id in enumerate(step):
                    if token_id >= 0:
                        rows[row + offset].append(token_id)
                        assert logits[offset].argmax() == checksum(rows[row + offset])
        assert engine.cache_length.tolist() == [len(sequence) for sequence in rows]


def test_repeated_decode_steps_become_graphs_and_the_oldest_makes_room(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path
) -> None:
    engine = open_engine(dialog, bundles["all"], library)
    sequence = [1]
    engine.prefill(0, ids(1))
    counts = []
    for token_id in (2, 3, 4):  # the first is enqueued, the second captured, the third launched
        sequence.append(token_id)
        assert engine.decode(0, ids(token_id))[0].argmax() == checksum(sequence)
        counts.append(int(dialog.held().split()[-1]))
    assert counts == [0, 1, 1]
    shapes = [(first, rows) for first in range(ROWS) for rows in range(1, ROWS - first + 1)]  # 10 of a window
    for window in range(2):
        if window:
            for row in range(ROWS):
                engine.truncate(row, 0)
                engine.prefill(row, np.ones(300, np.int64))
        for first, rows in shapes:
            engine.decode(first, ids(*[5] * rows))
            engine.decode(first, ids(*[6] * rows))
    assert dialog.held() == HELD.format(8, 16)
    assert engine.decode(0, ids(7))[0].argmax() == checksum([1] * 300 + [5, 6] * 4 + [7])


@pytest.mark.parametrize(
    "function",
    ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuMemcpyHtoDAsync_v2"],
)
def test_a_capture_that_fails_leaves_steps_without_graphs(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path, function: str
) -> None:
    engine = open_engine(dialog, bundles["all"], library)
    engine.prefill(0, ids(1))
    engine.decode(0, ids(2))
    # The copy of the inputs comes once for the step, and again for its capture.
    dialog.fail(function, nth=2 if function.startswith("cuMemcpy") else 1, result=900)
    for count in (1, 2, 3):
        assert engine.decode(0, ids(3))[0].argmax() == checksum([1, 2, *[3] * count])
    assert dialog.held() == HELD.format(8, 0)
    warnings = [text for level, text in dialog.want("log")["messages"] if level == 30]
    assert len(warnings) == 1 and "decode steps run without CUDA graphs, which is slower" in warnings[0]


def test_engines_of_one_model_share_its_weights_and_run_at_once(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path
) -> None:
    open_engine(dialog, bundles["all"], library, engines=2)
    assert dialog.want("race", ids=list(range(20, 60)), rounds=10)["others"] == 0
    assert dialog.want("race", ids=list(range(20, 60)), rounds=10, is_interrupted=True)["others"] == 0


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"])
def test_a_step_that_the_gpu_fails_changes_nothing(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path, function: str
) -> None:
    engine = open_engine(dialog, bundles["all"], library)
    engine.prefill(0, ids(1, 2))
    for _ in range(3):  # enqueued, captured, launched
        dialog.fail(function)
        try:
            engine.decode(0, ids(3))
        except GenerationError as error:
            assert "the GPU failed in " + function.partition("_")[0] in str(error)
        else:
            engine.truncate(0, 2)
        dialog.fail("")
        assert engine.cache_length.tolist() == [2, 0, 0, 0]
        assert engine.decode(0, ids(4))[0].argmax() == checksum([1, 2, 4])
        engine.truncate(0, 2)


@pytest.mark.parametrize(
    ("failing", "status", "said"),
    [
        ("createInferRuntime:1", ENGINE_MISMATCH, "can't start: it gave no reason"),
        ("createExecutionContext:1", ENGINE_FAILED, "can't make an execution context: createExecutionContext was made"),
        ("createExecutionContext:2", ENGINE_FAILED, "can't make an execution context"),
        ("setOptimizationProfileAsync:2", ENGINE_FAILED, "can't use the engine's profile 1"),
        ("loadLibrary:1", 0, ""),
    ],
)
def test_opening_that_tensorrt_fails_gives_everything_back(
    dialogs: Callable[..., GpuDialog], bundles: dict[str, Path], library: Path, failing: str, status: int, said: str
) -> None:
    with dialogs(TENSORRT_DOUBLE_FAILS=failing) as dialog:
        answer = dialog.open(bundles["all"], tensorrt=str(library))
        assert answer["status"] == status and said in answer.get("message", ""), answer
        dialog.want("close")
        assert dialog.held() == NOTHING


@pytest.mark.parametrize("failing", ["enqueueV3:3", "setInputShape:9", "setTensorAddress:12"])
def test_a_step_that_tensorrt_refuses_changes_nothing(
    dialogs: Callable[..., GpuDialog], bundles: dict[str, Path], library: Path, failing: str
) -> None:
    with dialogs(TENSORRT_DOUBLE_FAILS=failing) as dialog:
        engine = open_engine(dialog, bundles["all"], library)
        refused = 0
        sequence: list[int] = []
        for token_id in range(1, 12):
            try:
                logits = engine.decode(0, ids(token_id)) if sequence else engine.prefill(0, ids(token_id))[None]
            except GenerationError as error:
                assert "was made to fail" in str(error)
                refused += 1
            else:
                sequence.append(token_id)
                assert logits[0].argmax() == checksum(sequence)
        assert refused == 1


@pytest.mark.parametrize(
    "function",
    ["cuDevicePrimaryCtxRetain", "cuMemGetInfo_v2", "cuStreamCreate", "cuMemAlloc_v2", "cuMemAllocHost_v2"],
)
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_opening_that_the_gpu_fails_gives_everything_back(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path, function: str, nth: int
) -> None:
    dialog.fail(function, nth=nth, result=2 if "Alloc" in function else 999)
    answer = dialog.open(bundles["all"], tensorrt=str(library))
    has_failed = nth == 1 or "Alloc" in function
    assert (answer["status"] != 0) == has_failed, answer
    if has_failed:
        assert dialog.held() == NOTHING
    dialog.fail("")


def refusal(
    dialogs: Callable[..., GpuDialog],
    bundle: Path,
    status: int = ENGINE_MISMATCH,
    environment: Any = None,
    **options: Any,
) -> str:
    with dialogs(**(environment or {})) as dialog:
        answer = dialog.open(bundle, **options)
        assert answer["status"] == status, answer
        dialog.want("close")
        assert dialog.held() == NOTHING
        return str(answer["message"])


def test_libraries_of_another_version_are_refused(
    dialogs: Callable[..., GpuDialog], bundles: dict[str, Path], library: Path, tmp_path: Path
) -> None:
    def refused(version: str, bundle: Path = bundles["all"]) -> str:
        return refusal(dialogs, bundle, environment={"TENSORRT_DOUBLE_VERSION": version}, tensorrt=str(library))

    assert "TensorRT is 10.13.0.0, and the bundle's engine was built by 10.14.1.48" in refused("10.13.0.0")
    assert "TensorRT is 10.14.1.49, and" in refused("10.14.1.49")
    assert "is 11.0.0.1, and this build of libqwen_aot is for version 10; accepted" in refused("11.0.0.1")
    compatible = make_bundle(tmp_path / "compatible", version_compatible=True, version="10.15.0.1")
    with dialogs(TENSORRT_DOUBLE_VERSION="10.16.0.1", QWEN_AOT_ALLOW_BUNDLE_CODE="1") as dialog:
        open_engine(dialog, compatible, library)
    older = {"TENSORRT_DOUBLE_VERSION": "10.14.9.9", "QWEN_AOT_ALLOW_BUNDLE_CODE": "1"}
    assert "version 10.15.0.1 or later" in refusal(dialogs, compatible, environment=older, tensorrt=str(library))
    missing = refusal(dialogs, bundles["all"], tensorrt="/nonexistent/libnvinfer.so.10")
    assert "can't be loaded" in missing and "was built by TensorRT 10.14.1.48; install that version" in missing


def test_gpus_that_do_not_fit_are_refused(
    dialogs: Callable[..., GpuDialog], bundles: dict[str, Path], library: Path, tmp_path: Path
) -> None:
    def refused(bundle: Path, **environment: str) -> str:
        return refusal(dialogs, bundle, environment=environment, tensorrt=str(library))

    other = refused(bundles["all"], CUDA_DOUBLE_CAPABILITY="75")
    assert "A GPU's Double has compute capability 7.5; the bundle's engine runs on 8.6, 8.9." in other
    wide = make_bundle(tmp_path / "wide", hardware_compatible=True)
    assert "runs on 8.0 and later" in refused(wide, CUDA_DOUBLE_CAPABILITY="75")
    with dialogs(CUDA_DOUBLE_CAPABILITY="120") as dialog:
        open_engine(dialog, wide, library)
    small = refused(bundles["all"], CUDA_DOUBLE_BYTES=str(1 << 20))
    assert (
        "has 1 MiB of 1 MiB free, and the bundle needs about 2 MiB: weights 1 MiB, cache 0 MiB (4 rows of 1000" in small
    )
    assert "no GPU can be used" in refused(bundles["all"], CUDA_DOUBLE_DEVICES="0")


def test_engines_that_are_not_the_manifests_are_refused(
    dialogs: Callable[..., GpuDialog], library: Path, tmp_path: Path
) -> None:
    def refused(name: str, **arguments: Any) -> str:
        return refusal(dialogs, make_bundle(tmp_path / name, **arguments), tensorrt=str(library))

    assert "can't load 'engine.plan': the magic tag does not match. Rebuild" in refused("damaged", plan=lambda _: "x")
    assert "the engine has 9 inputs and outputs and the manifest lists 10" in refused(
        "fewer", plan=lambda text: "\n".join(line for line in text.split("\n") if " key_positions" not in line)
    )
    assert "has the input or output 'places', which the manifest doesn't list" in refused(
        "renamed", plan=lambda text: text.replace(" key_positions", " places")
    )
    assert "'position_ids' is of another kind, type or shape" in refused(
        "type", plan=lambda text: text.replace("position_ids input int64", "position_ids input int32")
    )
    assert "the engine reads 'new_tokens' in host memory; accepted" in refused("host", lines=("host new_tokens",))
    assert "profile 0 of the engine takes S of 1 to 7 in 'input_ids'; needed: 1 to 8" in refused(
        "S", sizes={"S": (1, 7)}
    )
    assert "takes W of 257 to 1024 in 'key_positions'; needed: 256 to 1024" in refused(
        "W", sizes={"W": (257, CAPACITY)}
    )
    assert "engine was built without its weights (--strip-weights)" in refused("weights", has_weights=False)


def test_code_of_a_bundle_runs_only_if_it_may(dialogs: Callable[..., GpuDialog], library: Path, tmp_path: Path) -> None:
    content = b"a plugin library"
    facts = PluginFacts("plugins.so", hashlib.sha256(content).hexdigest(), in_engine=False, ops=("QwenGQA",))
    bundle = make_bundle(tmp_path / "plugins", lines=("plugins",), files={"plugins.so": content}, plugins=facts)
    assert "the bundle brings native code" in refusal(dialogs, bundle, BUNDLE, tensorrt=str(library))
    own = tmp_path / "own.so"
    own.write_bytes(content)
    with dialogs() as dialog:
        assert dialog.open(bundle, tensorrt=str(library), plugins=str(own))["status"] == 0
    with dialogs() as dialog:
        assert dialog.open(bundle, tensorrt=str(library), allow_bundle_code=True)["status"] == 0
    # Whatever the manifest says, TensorRT isn't let run what an engine carries.
    carried = make_bundle(tmp_path / "carried", lines=("host_code",))
    assert "engine host code isn't allowed" in refusal(dialogs, carried, tensorrt=str(library))
    with dialogs() as dialog:
        honest = make_bundle(tmp_path / "honest", lines=("host_code",), version_compatible=True)
        assert dialog.open(honest, tensorrt=str(library), allow_bundle_code=True)["status"] == 0


def test_a_child_process_frees_what_its_parent_opened(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path
) -> None:
    engine = open_engine(dialog, bundles["all"], library)
    engine.prefill(0, ids(1, 2))
    assert dialog.want("free_in_child")["exit"] == 7
    assert engine.decode(0, ids(3))[0].argmax() == checksum([1, 2, 3])


def test_a_build_without_tensorrt_says_so(native: Native, driver: Path, bundles: dict[str, Path]) -> None:
    with GpuDialog(native.program("engine"), driver) as dialog:
        answer = dialog.open(bundles["all"])
        assert answer["status"] == UNSUPPORTED
        assert "has no TensorRT, and the bundle's engine 'engine.plan' is for target 'tensorrt'" in answer["message"]
        assert "-DQWEN_AOT_TENSORRT_INCLUDE_DIR=" in answer["message"]


@pytest.mark.deep
def test_it_is_clean_under_the_address_sanitizer(
    native_folder: Path, headers: Path, driver: Path, library: Path, bundles: dict[str, Path]
) -> None:
    with GpuDialog(tensorrt_program(Native(native_folder, "address"), headers), driver) as dialog:
        engine = open_engine(dialog, bundles["all"], library, engines=2)
        engine.prefill(0, ids(*range(20, 60)))
        for _ in range(4):
            engine.decode(0, ids(1, -1, 2))
        engine.copy_row(0, 3, 11)
        with pytest.raises(NonFiniteLogitsError):
            engine.prefill(1, ids(POISON))
        dialog.want("race", ids=list(range(20, 60)), rounds=5)
        dialog.want("close")
        assert dialog.held() == NOTHING
