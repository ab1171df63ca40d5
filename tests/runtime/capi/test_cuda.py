"""The C library's engine for target cuda: ONNX Runtime on the CPU; doubles play the provider's part and the driver."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import CAPACITY_STEP
from tests.runtime.backends.ort import test_engine as cases
from tests.runtime.capi.engines import ENGINE_MISMATCH, OUT_OF_MEMORY, NativeEngine
from tests.runtime.capi.gpu_doubles import NOTHING, ONNXRUNTIME, GpuDialog, build_double
from tests.runtime.capi.native import Native, run
from tests.runtime.toys import (
    ALL_INPUTS,
    VOCAB_SIZE,
    attention_model,
    checksum,
    checksum_model,
    io_tables,
    make_manifest,
    write_bundle,
)

ROWS = 4
# Engine and its cache: its memory, a stream; the context is the model's.
HELD = "contexts 1 current 0 device 2 pinned 0 streams 1 graphs 0 executables 0"


@pytest.fixture(scope="module")
def driver(native_folder: Path) -> Path:
    return build_double(native_folder / "doubles", "cuda_double", flags=("-Wl,-soname,libcuda.so.1",))


@pytest.fixture(scope="module")
def library(native_folder: Path) -> Path:
    return build_double(native_folder / "doubles", "onnxruntime_cuda_double")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cuda")
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = dataclasses.replace(make_manifest(inputs=inputs, outputs=outputs), target="cuda")
    checksums = write_bundle(root / "checksum", checksum_model(inputs, outputs), manifest)
    inputs, outputs = io_tables(cases.FEW_INPUTS, "float16")
    manifest = make_manifest(inputs=inputs, outputs=outputs, cache_dtype="float16")
    model = attention_model(inputs, outputs, cases.TABLE, cases.HEAD)
    attention = write_bundle(root / "attention", model, dataclasses.replace(manifest, target="cuda"))
    cpu = write_bundle(root / "cpu", model, manifest)
    model = attention_model(inputs, outputs, cases.TABLE[:100], cases.HEAD)
    short = write_bundle(root / "short", model, dataclasses.replace(manifest, target="cuda"))
    return {"checksum": checksums, "attention": attention, "cpu": cpu, "short": short}


@pytest.fixture
def dialog(native: Native, driver: Path) -> Iterator[GpuDialog]:
    with GpuDialog(native.program("engine"), driver) as dialog:
        yield dialog
        dialog.want("close")
        assert dialog.held() == NOTHING


def open_engine(dialog: GpuDialog, bundle: Path, library: Path) -> NativeEngine:
    answer = dialog.open(bundle, onnxruntime=str(library))
    assert answer["status"] == 0, answer
    return NativeEngine(dialog, ROWS, VOCAB_SIZE)


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
        lambda engine: cases.test_prefill_in_every_split_is_the_same(engine, 9),
        *(lambda engine, held=held: cases.test_idle_rows_do_not_move(engine, held) for held in (0, 3)),
    ],
)
def test_the_cases_of_the_python_engine(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path, case: Callable[[Any], None]
) -> None:
    """Each step's inputs come after they were bound: a binding that isn't made anew would feed the last step's."""
    engine = open_engine(dialog, bundles["checksum"], library)
    assert dialog.held() == HELD
    case(engine)
    assert dialog.held() == HELD


def test_logits_are_the_python_engines_to_the_bit(dialog: GpuDialog, bundles: dict[str, Path], library: Path) -> None:
    native, rng = open_engine(dialog, bundles["attention"], library), np.random.default_rng(5)
    with OnnxRuntimeEngine(load_bundle(bundles["cpu"]), OrtOptions()) as python:
        for row, length in enumerate((20, 1, CAPACITY_STEP - 2, 7)):
            prompt = rng.integers(0, VOCAB_SIZE, length)
            np.testing.assert_array_equal(native.prefill(row, prompt), python.prefill(row, prompt))
        for engine in (native, python):
            engine.copy_row(0, 3, 11)
        for step in range(5):  # row 2 outgrows the first capacity
            new = rng.integers(0, VOCAB_SIZE, ROWS)
            new[step % ROWS] = -1
            found, want = native.decode(0, new), python.decode(0, new)
            np.testing.assert_array_equal(found[new >= 0], want[new >= 0])


def test_failures_of_the_gpu_leave_the_rows_as_they_were(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path
) -> None:
    engine = open_engine(dialog, bundles["checksum"], library)
    engine.prefill(0, ids(1, 2, 3))
    dialog.fail("cuMemcpy2DAsync_v2")
    with pytest.raises(GenerationError, match=r"the GPU failed in cuMemcpy2DAsync: CUDA_ERROR_UNKNOWN \(999\); if it"):
        engine.copy_row(0, 1, 2)
    assert engine.cache_length.tolist() == [3, 0, 0, 0]
    dialog.fail("cuMemAlloc_v2", nth=2, result=2)
    with pytest.raises(GenerationError, match="no memory for a KV cache of 4 rows of 512 tokens"):
        engine.prefill(1, np.ones(300, np.int64))
    dialog.fail("cuMemsetD8Async", nth=2)
    with pytest.raises(GenerationError, match="failed in cuMemsetD8Async"):
        engine.prefill(1, np.ones(300, np.int64))
    assert dialog.held() == HELD
    dialog.fail("cuStreamSynchronize", nth=3)  # two allocations, and then the copies
    with pytest.raises(GenerationError, match="failed in cuStreamSynchronize"):
        engine.prefill(1, np.ones(300, np.int64))
    assert dialog.held() == HELD
    assert engine.prefill(0, ids(*[4] * 300)).argmax() == checksum([1, 2, 3, *[4] * 300])


def test_what_can_not_be_cleaned_up_after_a_failure_is_not_used_again(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path
) -> None:
    engine = open_engine(dialog, bundles["short"], library)
    engine.prefill(0, ids(1, 2))
    with pytest.raises(GenerationError, match="ONNX Runtime failed in a step of 1 rows and 1 tokens"):
        engine.decode(0, ids(150))  # past the table
    with OnnxRuntimeEngine(load_bundle(bundles["cpu"]), OrtOptions()) as python:
        python.prefill(0, ids(1, 2))
        np.testing.assert_array_equal(engine.decode(0, ids(3)), python.decode(0, ids(3)))
        engine.copy_row(0, 1, 1)  # waits for the GPU: had the step not waited for what was cleared, that came now
        np.testing.assert_array_equal(engine.decode(0, ids(4)), python.decode(0, ids(4)))
    dialog.fail("cuMemsetD2D8Async", result=700)
    with pytest.raises(GenerationError, match="ONNX Runtime failed in a step"):
        engine.decode(0, ids(150))
    lost = "can't be used any more .*CUDA_ERROR_ILLEGAL_ADDRESS.*this process can't use the GPU any more"
    with pytest.raises(GenerationError, match=lost):
        engine.decode(0, ids(3))


@pytest.mark.parametrize(
    ("function", "status"),
    [
        ("cuInit", ENGINE_MISMATCH),
        ("cuDeviceGetCount", ENGINE_MISMATCH),
        ("cuDeviceGet", ENGINE_MISMATCH),
        ("cuDeviceGetName", ENGINE_MISMATCH),
        ("cuDeviceGetAttribute", ENGINE_MISMATCH),
        ("cuDevicePrimaryCtxRetain", ENGINE_MISMATCH),
        ("cuStreamCreate", 6),
        ("cuMemAlloc_v2", OUT_OF_MEMORY),
        ("cuMemsetD8Async", 6),
        ("cuStreamSynchronize", 6),
    ],
)
def test_opening_that_fails_gives_everything_back(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path, function: str, status: int
) -> None:
    dialog.fail(function, result=2 if status == OUT_OF_MEMORY else 999)
    failed = dialog.open(bundles["checksum"], onnxruntime=str(library))
    assert failed["status"] == status, failed
    assert dialog.held() == NOTHING
    open_engine(dialog, bundles["checksum"], library)


def test_what_is_missing_is_named(native: Native, driver: Path, library: Path, bundles: dict[str, Path]) -> None:
    bundle = bundles["checksum"]

    def refused(environment: dict[str, str] | None = None, **options: Any) -> str:
        with GpuDialog(native.program("engine"), driver, environment) as dialog:
            answer = dialog.open(bundle, **{"onnxruntime": str(library), **options})
            assert answer["status"] == ENGINE_MISMATCH, answer
            assert dialog.held() == NOTHING
        return str(answer["message"])

    assert "has no CUDAExecutionProvider, which target cuda needs" in refused(onnxruntime=str(ONNXRUNTIME))
    assert "no NVIDIA driver was found" in refused(cuda_driver="/nonexistent/libcuda.so.1")
    assert "the NVIDIA driver has no cuInit" in refused(cuda_driver=str(library))
    assert "no GPU can be used (the driver shows none): check nvidia-smi" in refused({"CUDA_DOUBLE_DEVICES": "0"})
    provider = refused({"CUDA_PROVIDER_FAILS": "1"})
    assert "can't be used for target cuda: Failed to load shared library libcublasLt.so.12. It needs" in provider


def test_a_child_process_frees_what_its_parent_opened(
    dialog: GpuDialog, bundles: dict[str, Path], library: Path
) -> None:
    engine = open_engine(dialog, bundles["checksum"], library)
    engine.prefill(0, ids(1, 2))
    assert dialog.want("free_in_child")["exit"] == 7
    assert engine.decode(0, ids(3))[0].argmax() == checksum([1, 2, 3])


def test_the_double_ends_a_program_that_misuses_it(driver: Path, tmp_path: Path) -> None:
    """Negative controls: what the driver would let pass, or answer with nonsense."""
    calls = {
        "no context is current": "cuMemAlloc_v2(&address, 8);",
        "bytes outside of device memory": "cuCtxPushCurrent_v2(context); cuMemAlloc_v2(&address, 8);"
        "cuStreamCreate(&stream, 1); cuMemsetD8Async(address + 1, 0, 8, stream);",
        "outside of page-locked memory": "cuCtxPushCurrent_v2(context); cuMemAlloc_v2(&address, 8);"
        "cuStreamCreate(&stream, 1); cuMemcpyHtoDAsync_v2(address, &address, 8, stream);",
        "still to be done": "cuCtxPushCurrent_v2(context); cuMemAlloc_v2(&address, 8);"
        "cuStreamCreate(&stream, 1); cuMemsetD8Async(address, 0, 8, stream); cuMemFree_v2(address);",
        "it would wait for the default stream": "cuCtxPushCurrent_v2(context); cuStreamCreate(&stream, 0);",
        "memory or streams of the context are left": "cuCtxPushCurrent_v2(context); cuMemAlloc_v2(&address, 8);"
        "cuDevicePrimaryCtxRelease_v2(0);",
    }
    declarations = """
extern "C" {
int cuInit(unsigned); int cuDevicePrimaryCtxRetain(void**, int); int cuDevicePrimaryCtxRelease_v2(int);
int cuCtxPushCurrent_v2(void*); int cuMemAlloc_v2(unsigned long long*, unsigned long);
int cuStreamCreate(void**, unsigned);
int cuMemsetD8Async(unsigned long long, unsigned char, unsigned long, void*); int cuMemFree_v2(unsigned long long);
int cuMemcpyHtoDAsync_v2(unsigned long long, void const*, unsigned long, void*);
}
"""
    cases_ = "\n".join(f"case {number}: {call} break;" for number, call in enumerate(calls.values()))
    start = "unsigned long long address; void *stream, *context; cuInit(0); cuDevicePrimaryCtxRetain(&context, 0);"
    main = f"int main(int, char** arguments) {{ {start}\nswitch (std::atoi(arguments[1])) {{ {cases_} }} }}\n"
    (tmp_path / "misuse.cpp").write_text(f"#include <cstdlib>\n{declarations}{main}")
    run(["g++", tmp_path / "misuse.cpp", driver, f"-Wl,-rpath,{driver.parent}", "-o", tmp_path / "misuse"])
    (driver.parent / "libcuda.so.1").unlink(missing_ok=True)
    (driver.parent / "libcuda.so.1").symlink_to(driver.name)
    for number, said in enumerate(calls):
        done = subprocess.run([tmp_path / "misuse", str(number)], capture_output=True, text=True, check=False)
        assert done.returncode != 0 and said in done.stderr, (said, done)
