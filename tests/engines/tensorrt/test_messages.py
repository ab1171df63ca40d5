"""TensorRT's own words (as its versions 1.7 and 10 log them) become what happened and what to do."""

from __future__ import annotations

import pytest

from qwen_aot.engines.tensorrt.messages import failure, make_logger
from tests.engines.tensorrt.builder_double import make_module

NO_DRIVER = "Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)"


@pytest.mark.parametrize(
    ("said", "explained"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 3221225472 bytes.)", "ran out of memory; close other programs"),
        ("std::bad_alloc", "ran out of memory"),
        (
            "Tactic Selection: no tactics to implement the operation within workspace limit.",
            "raise --workspace-mib or leave it out",
        ),
        (
            "Cannot compile for target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3.",
            "a data type of this precision doesn't exist on sm86; leave that compute capability out",
        ),
        ('creator && "Plugin not found, are the plugin name correct?"', "no plugin for it is loaded"),
        (
            "qwen_aot QwenGQA: no kernels for SM 8.7; this library has them for 8.9 | 10: Could not find any "
            "implementation for node /attention.",
            "no kernels for this GPU; build it with `python -m qwen_aot.plugins.library --sm 8.7`",
        ),
        (
            "qwen_aot QwenMoE: the hidden size is 2000; it must be a multiple of 128 | Error Code 9",
            "a plugin refused: the hidden size is 2000; it must be a multiple of 128. It said: ",
        ),
        ("10: Could not find any implementation for node /mlp/MatMul.", "has no kernel for /mlp/MatMul on this GPU"),
        ("CHECK(x) failed. Attention operation was not supported by a dedicated kernel.", "no attention kernel"),
        ("Unable to load library: libnvinfer_lean.so.1: cannot open", "its library libnvinfer_lean.so.1 isn't"),
        ("Error while verifying IR", "its compiler failed on this graph"),
        ("The engine plan file is not compatible: different version", "written by another version"),
        (NO_DRIVER, "needs a GPU and its driver"),
        ("a new complaint", "doesn't know this error; please report it"),
    ],
)
def test_an_error_says_what_to_do_and_keeps_the_text(said: str, explained: str) -> None:
    message = str(failure("TensorRT 10.14", "compile the graph", [said]))
    assert message.startswith("TensorRT 10.14 couldn't compile the graph: ")
    assert explained in message
    assert message.endswith(f"It said: {said}")


def test_a_missing_driver_is_no_news_beside_another_error() -> None:
    message = str(failure("TensorRT-RTX 1.7", "compile the graph", ["std::bad_alloc", NO_DRIVER]))
    assert "memory" in message and "driver" not in message


def test_the_logger_keeps_errors_and_warnings_and_no_noise() -> None:
    trt = make_module()
    logger = make_logger(trt)
    logger.log(trt.ILogger.WARNING, "Make sure input input_ids has Int64 binding.")
    logger.log(trt.ILogger.WARNING, "a warning")
    logger.log(trt.ILogger.INTERNAL_ERROR, "an error")
    logger.log(trt.ILogger.VERBOSE, "a detail")
    assert (logger.errors, logger.warnings) == (["an error"], ["a warning"])
    logger.clear()
    assert logger.errors == logger.warnings == []
