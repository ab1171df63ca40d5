"""What a program may do wrong, or at an unusual time, has an answer: every case of src/abuse.c."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.runtime.capi.native import Native

CASES = [
    "free_null",
    "free_in_any_order",
    "model_freed_first",
    "cancel_what_ended",
    "callback_calls_back",
    "callback_frees",
    "callback_cancels",
    "chat_in_its_callback",
    "two_chats",
    "lengths_that_lie",
    "several_choices",
    "two_threads",
    "freed_under_a_step",
    "cancelled_at_any_time",
    "generators_in_threads",
    "forked",
    "forked_at_work",
    "exit_without_freeing",
    "freed_at_work",
]

FORKS = ("forked", "forked_at_work")


def run(program: Path, case: str, bundle: Path, onnxruntime: Path, **variables: str) -> None:
    environment = {**os.environ, "QWEN_AOT_ONNXRUNTIME": str(onnxruntime), **variables}
    done = subprocess.run(
        [program, case, bundle], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_every_case_is_here(native: Native) -> None:
    listed = subprocess.run([native.program("abuse")], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(listed) == sorted([*CASES, "vanished", "many_generations"])


@pytest.mark.parametrize("case", CASES)
def test_misuse_has_an_answer(native: Native, text_bundle: Path, onnxruntime: Path, case: str) -> None:
    run(native.program("abuse"), case, text_bundle, onnxruntime)


@pytest.mark.deep
@pytest.mark.parametrize("flavour", ["address", "thread"])
@pytest.mark.parametrize("case", CASES)
def test_under_a_sanitizer(native_folder: Path, text_bundle: Path, onnxruntime: Path, case: str, flavour: str) -> None:
    if flavour == "thread" and case in FORKS:
        pytest.skip("the sanitizer stops a child of a process with threads")
    program = Native(native_folder, flavour).program("abuse")
    run(
        program,
        case,
        text_bundle,
        onnxruntime,
        # ONNX Runtime is not instrumented: what it does among its own threads is not seen, and looks like races.
        TSAN_OPTIONS="ignore_noninstrumented_modules=1",
        # What exit_without_freeing leaves, and what ONNX Runtime keeps for its threads, is not lost.
        ASAN_OPTIONS=f"detect_leaks={int(case not in ('exit_without_freeing', *FORKS))}",
        LSAN_OPTIONS="suppressions=" + str(Path(__file__).with_name("leaks.txt")),
    )


def test_a_bundle_that_vanishes(native: Native, text_bundle: Path, onnxruntime: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(text_bundle, tmp_path / "bundle"))
    environment = {**os.environ, "QWEN_AOT_ONNXRUNTIME": str(onnxruntime)}
    with subprocess.Popen(
        [native.program("abuse"), "vanished", bundle],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "open\n", process.stderr.read()
        shutil.rmtree(bundle)
        process.stdin.write("x")
        process.stdin.close()
        assert process.stdout.read() == "ok\n", process.stderr.read()


def test_memory_stays_flat(native: Native, text_bundle: Path, onnxruntime: Path) -> None:
    run(native.program("abuse"), "many_generations", text_bundle, onnxruntime, N="1000")
    with pytest.raises(AssertionError, match="not so: least < 16"):  # 512 bytes a generation are seen
        run(native.program("abuse"), "many_generations", text_bundle, onnxruntime, N="1000", LEAK="512")


@pytest.mark.deep
def test_memory_stays_flat_over_ten_thousand(native: Native, text_bundle: Path, onnxruntime: Path) -> None:
    run(native.program("abuse"), "many_generations", text_bundle, onnxruntime, N="10000")
    with pytest.raises(AssertionError, match="not so: least < 16"):
        run(native.program("abuse"), "many_generations", text_bundle, onnxruntime, N="10000", LEAK="32")
