"""The C library's engine over ONNX Runtime: the Python engine's cases, its very bits, and what only C can ask."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_aot.errors import EngineMismatchError, GenerationError
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from tests.runtime.backends.ort import test_engine as cases
from tests.runtime.capi.engines import (
    CANCELLED,
    ENGINE_MISMATCH,
    OK,
    Dialog,
    NativeEngine,
)
from tests.runtime.capi.native import PROGRAMS, Native, run
from tests.runtime.toys import (
    ALL_INPUTS,
    VOCAB_SIZE,
    attention_model,
    checksum_model,
    io_tables,
    make_manifest,
    with_text_engine,
    write_bundle,
)

(LIBRARY,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
ROWS = 4


def toy(folder: Path, kind: str, **fields: Any) -> Path:
    """A bundle of the checksum model, also one that could check drafts, or of attention over a cache of a dtype."""
    is_checksum = kind in ("checksum", "speculating")
    names = ALL_INPUTS if is_checksum else cases.FEW_INPUTS
    if kind == "speculating":
        names, fields["logits_rows"] = (*names, "logits_positions"), 4
    inputs, outputs = io_tables(names, "float32" if is_checksum else kind)
    table = cases.TABLE.copy()
    table[13] = np.inf if fields.pop("is_damaged", False) else table[13]
    model = checksum_model(inputs, outputs) if is_checksum else attention_model(inputs, outputs, table, cases.HEAD)
    manifest = make_manifest(inputs=inputs, outputs=outputs, cache_dtype="float32" if is_checksum else kind, **fields)
    return write_bundle(folder, model, manifest)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("toys")
    return {kind: toy(root / kind, kind) for kind in ("checksum", "speculating", "float32", "float16", "int8")}


@pytest.fixture(scope="module")
def dialog(native: Native) -> Iterator[Dialog]:
    with Dialog(native.program("engine")) as dialog:
        yield dialog


def open_bundle(dialog: Dialog, bundle: Path, engines: int = 1, **options: Any) -> NativeEngine:
    request = {"threads": 1, "onnxruntime": str(LIBRARY), **options}
    dialog.want("open", bundle=str(bundle), engines=engines, **request)
    return NativeEngine(dialog, ROWS, VOCAB_SIZE)


def refusal(dialog: Dialog, bundle: Path, **options: Any) -> str:
    """Why a bundle isn't opened."""
    request = {"threads": 1, "engines": 1, "onnxruntime": str(LIBRARY), **options}
    answer = dialog.ask("open", bundle=str(bundle), **request)
    assert answer["status"] == ENGINE_MISMATCH, answer
    return str(answer["message"])


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int64)


@pytest.mark.parametrize(
    "case",
    [
        cases.test_prefill_and_decode_continue_one_sequence,
        cases.test_rows_of_unequal_length_decode_together,
        cases.test_a_range_of_rows_leaves_the_others_alone,
        cases.test_truncate_forgets_the_end,
        cases.test_a_full_context_is_refused_and_nothing_is_written,
        cases.test_unknown_ids_and_empty_prompts_are_refused,
        cases.test_rows_that_do_not_exist_are_refused,
        *(lambda engine, cut=cut: cases.test_prefill_in_every_split_is_the_same(engine, cut) for cut in (1, 8, 9, 19)),
        *(lambda engine, held=held: cases.test_idle_rows_do_not_move(engine, held) for held in (0, 3)),
    ],
)
def test_the_cases_of_the_python_engine(dialog: Dialog, bundles: dict[str, Path], case: Callable[[Any], None]) -> None:
    case(open_bundle(dialog, bundles["checksum"]))


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_attention_is_that_of_the_python_engine(dialog: Dialog, bundles: dict[str, Path], kind: str) -> None:
    attention = open_bundle(dialog, bundles[kind]), cases.TOLERANCE[kind]
    cases.test_attention_equals_the_formula_in_every_split(attention)  # type: ignore[arg-type]
    for row in range(ROWS):
        attention[0].truncate(row, 0)
    cases.test_attention_with_idle_rows_and_growth(attention)  # type: ignore[arg-type]
    for row in range(ROWS):
        attention[0].truncate(row, 0)
    cases.test_a_row_does_not_depend_on_the_others(attention)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["checksum", "speculating", "float32", "float16", "int8"])
def test_logits_are_the_python_engines_to_the_bit(dialog: Dialog, bundles: dict[str, Path], kind: str) -> None:
    """The same calls on both, at random; both run one library, so no bit may differ."""
    native = open_bundle(dialog, bundles[kind])
    with OnnxRuntimeEngine(load_bundle(bundles[kind]), OrtOptions(threads=1)) as python:

        @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(data=st.data())
        def compare(data: st.DataObject) -> None:
            for row in range(ROWS):
                python.truncate(row, 0)
                native.truncate(row, 0)
            for _ in range(data.draw(st.integers(1, 12))):
                action = data.draw(st.sampled_from(["prefill", "decode", "truncate", "copy_row"]))
                row = data.draw(st.integers(0, ROWS - 1))
                held = int(python.cache_length[row])
                arguments: tuple[Any, ...]
                if action == "prefill":
                    new = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40))
                    arguments = (row, ids(*new))
                elif action == "decode":
                    arguments = (row, ids(*data.draw(st.lists(st.integers(-1, 210), min_size=1, max_size=ROWS - row))))
                elif action == "truncate":
                    arguments = (row, data.draw(st.integers(0, held)))
                else:
                    arguments = (
                        row,
                        (row + data.draw(st.integers(1, ROWS - 1))) % ROWS,
                        data.draw(st.integers(0, held)),
                    )
                want, found = (getattr(engine, action)(*arguments) for engine in (python, native))
                if want is not None:
                    fed = arguments[1] >= 0 if action == "decode" else slice(None)
                    assert want[fed].tobytes() == found[fed].tobytes()
                assert python.cache_length.tolist() == native.cache_length.tolist()

        compare()


def test_nan_in_the_logits_names_the_row_and_changes_nothing(dialog: Dialog, tmp_path: Path) -> None:
    engine = open_bundle(dialog, toy(tmp_path / "bundle", "float32", is_damaged=True))
    engine.prefill(0, ids(1))
    engine.prefill(1, ids(2))
    with pytest.raises(NonFiniteLogitsError, match=r"logits of row 1 hold NaN or Inf: .*--precision fp32") as caught:
        engine.decode(0, ids(3, 13))
    assert caught.value.rows == (1,)
    with pytest.raises(NonFiniteLogitsError, match="logits of row 0 hold"):
        engine.prefill(0, ids(*[1] * 9, 13))
    assert engine.cache_length.tolist() == [1, 1, 0, 0]
    assert np.isfinite(engine.decode(0, ids(3, 4))).all()


def test_engines_of_one_backend_run_at_once(dialog: Dialog, bundles: dict[str, Path]) -> None:
    """Each has its own cache: in two threads they give the logits of one alone, to the bit."""
    tokens = list(range(1, 60))
    open_bundle(dialog, bundles["float32"], engines=2)
    together = dialog.want("race", ids=tokens, rounds=40)
    assert together["others"] == 0
    alone = open_bundle(dialog, bundles["float32"])
    assert together["first"].startswith(_hex(alone.prefill(0, ids(*tokens))))
    open_bundle(dialog, bundles["float32"], engines=2)
    interrupted = dialog.want("race", ids=tokens, rounds=40, is_interrupted=True)
    assert (interrupted["others"], interrupted["first"]) == (0, together["first"])


def _hex(logits: np.ndarray) -> str:
    return logits.view(np.uint32).astype(">u4").tobytes().hex()


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt of it is one step that takes long: S is large, and so is V, whose logits are of the last token only."""
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs, max_context=60000, prefill_chunk=50000)
    return write_bundle(tmp_path_factory.mktemp("slow") / "bundle", checksum_model(inputs, outputs), manifest)


def test_an_interrupted_prefill_ends_at_once_and_may_be_repeated(dialog: Dialog, slow_bundle: Path) -> None:
    engine = open_bundle(dialog, slow_bundle)
    prompt = ids(*[7, 8, 9] * 16000)
    want = engine.prefill(0, prompt).copy()
    engine.truncate(0, 0)
    started = time.perf_counter()
    engine.prefill(0, prompt)
    whole = time.perf_counter() - started
    engine.truncate(0, 0)
    dialog.want("interrupt_idle")  # does nothing, now or later
    np.testing.assert_array_equal(engine.prefill(0, prompt), want)
    engine.truncate(0, 0)
    dialog.want("log")
    # On a busy machine it may come before the step or behind it, which is no interruption: asked for again, elsewhere.
    answers = []
    for attempt in range(40):
        delay = int(whole * 1e6 * (0.1 + attempt % 8 / 10))
        answers.append(dialog.want("interrupt", ids=prompt.tolist(), after_us=delay))
        if answers[-1]["found"] == CANCELLED:
            break
        engine.truncate(0, 0)
    assert answers[-1]["found"] == CANCELLED
    for answer in answers:
        assert answer["found"] in (OK, CANCELLED)
        assert answer["length"] % len(prompt) == 0
        assert answer["seconds"] < 5.0
    assert all(level == 10 for level, _ in dialog.want("log")["messages"])  # who asked for it knows
    engine.truncate(0, 0)
    np.testing.assert_array_equal(engine.prefill(0, prompt), want)


def test_the_log_has_what_onnxruntime_says_and_nothing_is_printed(
    native: Native, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """An id past the embedding's table is for the library to refuse: ids are checked against the vocabulary only."""
    inputs, outputs = io_tables(cases.FEW_INPUTS, "float32")
    model = attention_model(inputs, outputs, cases.TABLE[:100], cases.HEAD)
    path = write_bundle(tmp_path / "bundle", model, make_manifest(inputs=inputs, outputs=outputs))
    dialog = Dialog(native.program("engine"))
    try:
        engine = open_bundle(dialog, path)
        engine.prefill(0, ids(1, 2))
        failure = (
            r"ONNX Runtime failed in a step of 1 rows and 1 tokens: .*Gather.*If memory ran out, use a shorter text"
        )
        with pytest.raises(GenerationError, match=failure):
            engine.prefill(0, ids(150))
        ((level, message),) = dialog.want("log")["messages"]
        assert level == 40 and message.startswith("ONNX Runtime: ") and "Gather" in message
        assert engine.cache_length.tolist() == [2, 0, 0, 0]
        engine.decode(0, ids(99))
        # Another model's log goes where that one's options say, and the first one's has gone with it.
        open_bundle(dialog, bundles["float32"])
    finally:
        assert dialog.close() == ""


def test_libraries_that_do_not_fit_are_refused(
    native: Native, dialog: Dialog, bundles: dict[str, Path], tmp_path: Path
) -> None:
    bundle = bundles["checksum"]
    missing = refusal(dialog, bundle, onnxruntime="/nonexistent/libonnxruntime.so")
    assert "'/nonexistent/libonnxruntime.so' can't be loaded" in missing
    assert (
        "the bundle's target cpu needs ONNX Runtime 1.32 or newer. Name its libonnxruntime.so in the option" in missing
    )
    other = tmp_path / "libother.so"
    run(["g++", "-shared", "-fPIC", PROGRAMS / "other_onnxruntime.cpp", "-o", other])
    assert "is not ONNX Runtime (it has no OrtGetApiBase)" in refusal(dialog, bundle, onnxruntime=str(other))
    for version, said in (
        ("1.31.1", "is ONNX Runtime 1.31.1, and the bundle's target cpu needs 1.32 or newer"),
        ("1.4", "is ONNX Runtime 1.4,"),
        ("nightly", "is ONNX Runtime nightly,"),
        ("2.0.0", "is ONNX Runtime 2.0.0,"),
    ):
        environment = {**os.environ, "OTHER_ONNXRUNTIME": version, "QWEN_AOT_ONNXRUNTIME": str(other)}
        with Dialog(native.program("engine"), environment) as fresh:
            assert said in refusal(fresh, bundle, onnxruntime="")
            open_bundle(fresh, bundle)  # the option goes before the environment, and beside a library of the same kind
    environment = {**os.environ, "OTHER_ONNXRUNTIME": "1.99.0"}
    # A newer library may drop old versions of its interface.
    with Dialog(native.program("engine"), environment) as fresh:
        (tmp_path / "new.cpp").write_text((PROGRAMS / "other_onnxruntime.cpp").read_text().replace('"9.9.9"', '"0"'))
        run(["g++", "-shared", "-fPIC", tmp_path / "new.cpp", "-o", tmp_path / "libnew.so"])
        assert "doesn't give version 17 of its interface" in refusal(
            fresh, bundle, onnxruntime=str(tmp_path / "libnew.so")
        )


def test_the_environment_names_the_library(native: Native, bundles: dict[str, Path]) -> None:
    program = native.program("engine")
    with Dialog(program, {**os.environ, "QWEN_AOT_ONNXRUNTIME": str(LIBRARY)}) as dialog:
        open_bundle(dialog, bundles["checksum"], onnxruntime="").prefill(0, ids(1))
    bare = {key: value for key, value in os.environ.items() if key != "QWEN_AOT_ONNXRUNTIME"}
    with Dialog(program, bare) as dialog:
        assert "'libonnxruntime.so.1' can't be loaded" in refusal(dialog, bundles["checksum"], onnxruntime="")


def test_graphs_that_are_not_the_manifests_are_refused(dialog: Dialog, tmp_path: Path) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    model, manifest = checksum_model(inputs, outputs), make_manifest(inputs=inputs, outputs=outputs)

    def refused(name: str, model: Any, manifest: Any) -> str:
        return refusal(dialog, write_bundle(tmp_path / name, model, manifest))

    broken = checksum_model(inputs, outputs)
    broken.graph.node[0].op_type = "NoSuchOp"
    assert "NoSuchOp" in refused("no such op", broken, manifest)
    fewer = with_text_engine(manifest, inputs=inputs[:-1], outputs=outputs[:-1])
    assert "the graph has 7 inputs and the manifest lists 6; rebuild" in refused("fewer", model, fewer)
    renamed = checksum_model(inputs, outputs)
    renamed.graph.input[4].name = "key_places"
    for node in renamed.graph.node:
        node.input[:] = ["key_places" if name == "key_positions" else name for name in node.input]
    assert "the graph has the input 'key_places', which the manifest doesn't list" in refused("name", renamed, manifest)
    half, _ = io_tables(ALL_INPUTS, "float16")
    typed = with_text_engine(manifest, inputs=half, cache_dtype="float16")
    assert "is of element type 1 with 4 dimensions in the graph, and float16" in refused("type", model, typed)
    other = dataclasses.replace(inputs[0], name="token_types")
    unknown = with_text_engine(manifest, inputs=(other, *inputs[1:]))
    assert "the input 'token_types' of dtype int64, which this runtime can't feed" in refused("input", model, unknown)
    cut = with_text_engine(manifest, outputs=(dataclasses.replace(outputs[0], dtype="float16"), *outputs[1:]))
    assert "outputs that aren't those of its inputs" in refused("logits", model, cut)


def test_a_target_that_no_backend_runs_is_refused(dialog: Dialog, bundles: dict[str, Path], tmp_path: Path) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = dataclasses.replace(make_manifest(inputs=inputs, outputs=outputs), target="cuda")
    path = write_bundle(tmp_path / "cuda", checksum_model(inputs, outputs), manifest)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "CUDA" in refusal(dialog, path)


@pytest.mark.parametrize("name", [".onnx", "sub/.onnx", ".plan", ".rtx"])
def test_a_file_that_is_all_suffix_has_none(
    dialog: Dialog, bundles: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The check of what a graph reads goes by the suffix: what isn't checked mustn't be opened."""
    path = shutil.copytree(bundles["float32"], tmp_path / "bundle")
    (path / name).parent.mkdir(exist_ok=True)
    (path / "model.onnx").rename(path / name)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"model.onnx"', f'"{name}"'), encoding="utf-8")
    assert "which this version of the library can't run" in refusal(dialog, path)
    with pytest.raises(EngineMismatchError, match="which this version of the runtime can't run"):
        open_engine(load_bundle(path))


def test_a_fast_prefill_is_refused_where_integer_products_saturate(native: Native, tmp_path: Path) -> None:
    from qwen_aot.runtime.backends.cpu.features import has_exact_integer_products

    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = with_text_engine(make_manifest(inputs=inputs, outputs=outputs), quantization={"fast_prefill": True})
    path = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    program = native.program("engine")
    with Dialog(program, {**os.environ, "QWEN_AOT_NO_VNNI": "1"}) as dialog:
        assert "Rebuild without --fast-prefill" in refusal(dialog, path)
    with Dialog(program) as dialog:
        if has_exact_integer_products():
            open_bundle(dialog, path)
        else:
            refusal(dialog, path)


def test_a_child_process_frees_what_its_parent_opened(dialog: Dialog, bundles: dict[str, Path]) -> None:
    engine = open_bundle(dialog, bundles["float32"], engines=2, threads=3)
    engine.prefill(0, ids(1, 2, 3))
    assert dialog.want("free_in_child")["exit"] == 7
    engine.decode(0, ids(4))


def test_the_rest_of_a_step_takes_microseconds(dialog: Dialog, bundles: dict[str, Path]) -> None:
    """A step of the smallest graph, ONNX Runtime's part included."""
    engine = open_bundle(dialog, bundles["float32"])
    engine.prefill(0, ids(1))
    least = dialog.want("time_decode", steps=300)["least"]
    assert least < 200e-6  # 15 µs on an idle machine; a binding call a step would show as much again


def test_bundles_open_and_close_with_flat_memory(dialog: Dialog, bundles: dict[str, Path]) -> None:
    def cycles(count: int) -> None:
        for _ in range(count):
            open_bundle(dialog, bundles["float32"]).prefill(0, ids(1, 2))
            dialog.want("close")

    cycles(15)
    before = dialog.want("peak")["bytes"]
    cycles(30)
    assert dialog.want("peak")["bytes"] - before < 3 << 20


@pytest.mark.deep
@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_it_is_clean_under_sanitizers(native_folder: Path, flavour: str, bundles: dict[str, Path]) -> None:
    """ONNX Runtime isn't instrumented: what its threads do to each other is hidden, what we do to memory isn't."""
    suppressions = PROGRAMS / "onnxruntime.supp"
    environment = {**os.environ, "TSAN_OPTIONS": f"suppressions={suppressions} ignore_noninstrumented_modules=1"}
    with Dialog(Native(native_folder, flavour).program("engine"), environment) as dialog:
        engine = open_bundle(dialog, bundles["float32"], engines=2)
        engine.prefill(0, ids(*range(30)))
        engine.copy_row(0, 2, 7)
        engine.decode(0, ids(1, -1, 2))
        dialog.want("interrupt", ids=list(range(200)), after_us=100)
        for row in range(ROWS):
            engine.truncate(row, 0)
        assert dialog.want("race", ids=list(range(1, 60)), rounds=10, is_interrupted=True)["others"] == 0
        refusal(dialog, bundles["float32"], onnxruntime="/nonexistent")
        open_bundle(dialog, bundles["checksum"])


def test_peak_memory_is_the_python_engines(native: Native, bundles: dict[str, Path]) -> None:
    """Of processes that do nothing else: less than Python's over the same calls by what Python itself takes."""
    code = f"""
import re
import numpy as np
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
engine = OnnxRuntimeEngine(load_bundle({str(bundles["float32"])!r}), OrtOptions(threads=1))
engine.prefill(0, np.arange(1, 200))
engine.decode(0, np.array([1]))
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""
    python = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    with Dialog(native.program("engine")) as dialog:
        engine = open_bundle(dialog, bundles["float32"])
        engine.prefill(0, np.arange(1, 200))
        engine.decode(0, ids(1))
        assert dialog.want("peak")["bytes"] < python - (20 << 20)
