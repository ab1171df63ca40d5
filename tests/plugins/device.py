"""The library's own code on the GPU, with no TensorRT: `python -m tests.plugins.device HARNESS LIBRARY`.

The cases are those of `sanitizer_cases`, for which Triton compiles the kernels again; here they run as they are
embedded, through `enqueue`. Each is compared with its reference, and again when a CUDA graph of it is replayed, as is
the graph of a plugin's first step; and as the builder times it, with lengths that mean nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from tests.plugins.any_step import Step
from tests.plugins.bounds import assert_close
from tests.plugins.gqa_cases import CACHE, GqaStep
from tests.plugins.harness import POISON, Call, Harness, prepare
from tests.plugins.linear_cases import LinearStep
from tests.plugins.sanitizer_cases import CASES


@contextmanager
def plugin_of(
    harness: Harness, step: Step, device: torch.device, stream: int, *, is_timed: bool = False
) -> Iterator[tuple[Call, Callable[[], None]]]:
    """A step's tensors, and what enqueues it; poisoned workspace of just the size that the plugin asks for.

    Args:
        harness: has the library.
        step: what to compute.
        device: where.
        stream: its handle.
        is_timed: as the builder does, with present elsewhere than past and lengths of any value; else as a deserialized
            engine does.
    """
    call = prepare(step, device, is_copied=is_timed)
    plugin = harness.create(step)
    workspace = torch.full((harness.configure(plugin, [call]),), POISON, dtype=torch.uint8, device=device)
    plugin = harness.attach(plugin) if is_timed else harness.restore(plugin)
    harness.choose_tactic(plugin, step)

    def submit() -> None:
        status = harness.enqueue(plugin, call, workspace.data_ptr(), ctypes.c_void_p(stream))
        assert status == 0, harness.take_log()

    try:
        yield call, submit
    finally:
        harness.destroy(plugin)


def check(step: Step, tensors: Mapping[str, torch.Tensor]) -> None:
    """Output, and the cache after attention, are what the reference gives, within what compiling may change."""
    if not isinstance(step, GqaStep):
        assert_close(tensors["output"], step.expected())
        return
    expected = step.expected()
    assert expected["output"] is not None
    assert_close(tensors["output"], expected["output"])
    for name in CACHE:
        if (cache := expected[name]) is not None:
            # A product that fuses into a sum may land on the other side of a rounding.
            tolerance = {"rtol": 0, "atol": 1} if cache.dtype == torch.int8 else {"rtol": 2.0**-7, "atol": 1e-3}
            torch.testing.assert_close(tensors[name].cpu(), cache, equal_nan=True, **tolerance)


def run(harness: Harness) -> None:
    """All cases, on the GPU."""
    device, stream = torch.device("cuda"), torch.cuda.Stream()
    # Without PyTorch's own memory pools, as under the sanitizer, nothing can be captured.
    can_capture = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
    for make in CASES.values():
        step = make()
        with plugin_of(harness, step, device, stream.cuda_stream) as (call, submit):
            torch.cuda.synchronize()  # the tensors were made on another stream
            submit()
            torch.cuda.synchronize()
            check(step, call.named)
            if can_capture:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    submit()
                call.named["output"].fill_(torch.nan)
                torch.cuda.synchronize()
                graph.replay()
                torch.cuda.synchronize()
                check(step, call.named)
        if can_capture:
            with plugin_of(harness, step, device, stream.cuda_stream) as (call, submit):
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    submit()  # a plugin's first: its code is loaded meanwhile
                graph.replay()
                torch.cuda.synchronize()
                check(step, call.named)
        if not isinstance(step, LinearStep):
            timed = replace(step, is_timed=True)
            with plugin_of(harness, timed, device, stream.cuda_stream, is_timed=True) as (call, submit):
                if isinstance(step, GqaStep):
                    call.named["cache_length"].fill_(2**40)
                torch.cuda.synchronize()
                submit()
                torch.cuda.synchronize()
                check(timed, call.named)


if __name__ == "__main__":
    run(Harness(Path(sys.argv[1]), Path(sys.argv[2])))
    print(f"{len(CASES)} cases ran")
