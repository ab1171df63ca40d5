"""The double of CUDA's runtime refuses what CUDA leaves undefined, and has nothing that CUDA hasn't."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.doubles.cuda_runtime import make_cuda_runtime
from tests.doubles.gpu import Gpu, MisuseError
from tests.tools import require_package

UP, DOWN, THREAD_LOCAL = 1, 2, 1


class Program:
    """Calls by name, whose status must be success."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.api: ModuleType = make_cuda_runtime(gpu)
        self.stream = self("cudaStreamCreateWithFlags", 1)

    def __call__(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self.api, name)(*arguments)
        assert status.name == "cudaSuccess", (name, status)
        return values[0] if len(values) == 1 else tuple(values)

    def content(self, address: int, count: int) -> np.ndarray:
        return self.gpu.view(address, count)


@pytest.fixture
def program() -> Program:
    return Program(Gpu(total_bytes=1 << 20))


def test_copies_are_done_when_they_are_waited_for(program: Program) -> None:
    device, host = program("cudaMalloc", 8), program("cudaMallocHost", 8)
    program.content(host, 8)[:] = 7
    program("cudaMemcpyAsync", device, host, 8, UP, program.stream)
    assert (program.content(device, 8) == 0xFF).all()
    program("cudaStreamSynchronize", program.stream)
    assert (program.content(device, 8) == 7).all()
    program.content(host, 8)[:] = 1
    program("cudaMemcpyAsync", host, device, 8, DOWN, program.stream)
    assert (program.content(host, 8) == 0xFF).all()  # read too early
    program("cudaStreamSynchronize", program.stream)
    assert (program.content(host, 8) == 7).all()


def test_a_replay_copies_what_is_there_then(program: Program) -> None:
    device, host = program("cudaMalloc", 8), program("cudaMallocHost", 8)
    program("cudaStreamBeginCapture", program.stream, THREAD_LOCAL)
    program("cudaMemcpyAsync", device, host, 8, UP, program.stream)
    graph = program("cudaStreamEndCapture", program.stream)
    executable = program("cudaGraphInstantiate", graph, 0)
    program("cudaGraphDestroy", graph)
    for value in (3, 4):
        program.content(host, 8)[:] = value
        program("cudaGraphLaunch", executable, program.stream)
        program("cudaStreamSynchronize", program.stream)
        assert (program.content(device, 8) == value).all()


def _write_while_pending(program: Program) -> None:
    device, host = program("cudaMalloc", 8), program("cudaMallocHost", 8)
    program("cudaMemcpyAsync", device, host, 8, UP, program.stream)
    program.content(host, 8)[:] = 1
    program("cudaStreamSynchronize", program.stream)


def _copy_too_much(program: Program) -> None:
    program("cudaMemcpyAsync", program("cudaMalloc", 8), program("cudaMallocHost", 16), 16, UP, program.stream)


def _copy_from_where_the_device_is(program: Program) -> None:
    program("cudaMemcpyAsync", program("cudaMalloc", 8), program("cudaMalloc", 8), 8, UP, program.stream)


def _free_twice(program: Program) -> None:
    address = program("cudaMalloc", 8)
    program("cudaFree", address)
    program("cudaFree", address)


def _free_host_memory_as_device_memory(program: Program) -> None:
    program("cudaFree", program("cudaMallocHost", 8))


def _free_the_middle(program: Program) -> None:
    program("cudaFree", program("cudaMalloc", 8) + 4)


def _free_while_pending(program: Program) -> None:
    address = program("cudaMalloc", 8)
    program("cudaMemsetAsync", address, 0, 8, program.stream)
    program("cudaFree", address)


def _fill_beyond_the_end(program: Program) -> None:
    program("cudaMemset2DAsync", program("cudaMalloc", 64), 32, 0, 32, 3, program.stream)


def _wait_in_a_capture(program: Program) -> None:
    program("cudaStreamBeginCapture", program.stream, THREAD_LOCAL)
    program("cudaStreamSynchronize", program.stream)


def _allocate_in_a_capture(program: Program) -> None:
    program("cudaStreamBeginCapture", program.stream, THREAD_LOCAL)
    program("cudaMalloc", 8)


def _use_after_free(program: Program) -> None:
    address = program("cudaMalloc", 8)
    program("cudaFree", address)
    program("cudaMemsetAsync", address, 0, 8, program.stream)


def _launch_what_was_destroyed(program: Program) -> None:
    program("cudaStreamBeginCapture", program.stream, THREAD_LOCAL)
    executable = program("cudaGraphInstantiate", program("cudaStreamEndCapture", program.stream), 0)
    program("cudaGraphExecDestroy", executable)
    program("cudaGraphLaunch", executable, program.stream)


def _use_a_stream_that_was_destroyed(program: Program) -> None:
    program("cudaStreamDestroy", program.stream)
    program("cudaStreamSynchronize", program.stream)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (_write_while_pending, "pinned memory changed while a copy from it was pending"),
        (_copy_too_much, "16 bytes at .* are in no live device memory"),
        (_copy_from_where_the_device_is, "are device memory; needed: pinned"),
        (_free_twice, "was freed as device memory and is none"),
        (_free_host_memory_as_device_memory, "was freed as device memory and is none"),
        (_free_the_middle, "was freed as device memory and is none"),
        (_free_while_pending, "device memory was freed while work is pending"),
        (_fill_beyond_the_end, "96 bytes at .* are in no live device memory"),
        (_wait_in_a_capture, "cudaStreamSynchronize was called while a stream is being captured"),
        (_allocate_in_a_capture, "cudaMalloc was called while a stream is being captured"),
        (_use_after_free, "8 bytes at .* are in no live device memory"),
        (_launch_what_was_destroyed, "a graph was launched that doesn't exist"),
        (_use_a_stream_that_was_destroyed, "is no stream"),
    ],
)
def test_what_cuda_leaves_undefined(program: Program, misuse: Callable[[Program], None], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        misuse(program)
    with pytest.raises(AssertionError, match=message):  # whoever may have caught it
        program.gpu.assert_empty()


@pytest.mark.parametrize("leak", ["cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"])
def test_what_is_left_is_told(leak: str) -> None:
    gpu = Gpu()
    gpu.assert_empty()
    getattr(make_cuda_runtime(gpu), leak)(8)
    with pytest.raises(AssertionError, match="left on the GPU"):
        gpu.assert_empty()


def test_memory_has_an_end(program: Program) -> None:
    status, address = program.api.cudaMalloc(2 << 20)
    assert status.name == "cudaErrorMemoryAllocation" and address is None


def test_a_sticky_error_stays(program: Program) -> None:
    address = program("cudaMalloc", 8)
    program.gpu.fail("cudaMemsetAsync", "cudaErrorIllegalAddress")
    names = [program.api.cudaMemsetAsync(address, 0, 8, program.stream)[0].name]
    names += [program.api.cudaMalloc(8)[0].name, program.api.cudaFree(address)[0].name]
    assert names == ["cudaErrorIllegalAddress"] * 3
    assert not program.gpu.allocations


@pytest.mark.tools
def test_it_has_nothing_that_the_library_has_not() -> None:
    real = require_package("cuda.bindings.runtime", "pip install cuda-bindings")
    double = make_cuda_runtime(Gpu())
    for name in (name for name in dir(double) if name.startswith("cuda")):
        ours, theirs = getattr(double, name), getattr(real, name)
        if isinstance(ours, type):
            assert {member.name: int(member) for member in ours} == {
                member.name: int(getattr(theirs, member.name)) for member in ours
            }
        elif isinstance(ours, int):
            assert ours == theirs
