"""CudaMemory against a strict double of the CUDA runtime, and a KV cache that lies in it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from qwen_aot.errors import EngineMismatchError, GenerationError
from qwen_aot.runtime.backends.cuda.memory import CudaMemory
from qwen_aot.runtime.backends.cuda.runtime import Cuda
from qwen_aot.runtime.bundle.manifest import CAPACITY_STEP, IoTensor
from qwen_aot.runtime.engine.kv_cache import KvCache
from qwen_aot.runtime.engine.kv_memory import Runs
from tests.runtime.engine.test_kv_cache import EagerMemory
from tests.runtime.fake_cuda import Code, FakeCuda

TENSORS = (
    IoTensor("past_key_values.0.key", "float16", ("B", 2, "C", 4)),
    IoTensor("past_key_values.0.key_scale", "float32", ("B", 2, "C")),
)


def test_new_memory_is_zero_and_every_call_has_finished() -> None:
    fake = FakeCuda()
    block = CudaMemory(Cuda(fake)).allocate(100)
    assert fake.read(block.pointer, 100) == bytes(100)
    assert fake.unfinished == 0


def test_runs_are_copied_and_cleared() -> None:
    fake = FakeCuda()
    memory = CudaMemory(Cuda(fake))
    small, large = memory.allocate(6), memory.allocate(10)
    fake.write(small.pointer, b"abcdef")
    memory.copy(Runs(small, 0, 3), Runs(large, 1, 5), 2, 2)
    assert fake.read(large.pointer, 10) == b"\0ab\0\0\0de\0\0"
    memory.clear(Runs(small, 1, 3), 1, 2)
    assert fake.read(small.pointer, 6) == b"a\0cd\0f"
    assert fake.unfinished == 0


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ((Code.cudaErrorInsufficientDriver, 0), r"no GPU can be used \(cudaErrorInsufficientDriver\)"),
        ((Code.cudaSuccess, 0), r"no GPU can be used \(cudaErrorNoDevice\).*nvidia-smi"),
    ],
)
def test_a_machine_without_a_gpu(devices: tuple[Code, int], message: str) -> None:
    fake = FakeCuda()
    fake.devices = devices
    with pytest.raises(EngineMismatchError, match=message):
        CudaMemory(Cuda(fake))


def test_missing_bindings_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineMismatchError, match="install them with pip install cuda-bindings"):
        CudaMemory()


def test_an_error_of_the_gpu_says_which_work_failed() -> None:
    fake = FakeCuda()
    memory = CudaMemory(Cuda(fake))
    block = memory.allocate(8)
    fake.fails = Code.cudaErrorIllegalAddress
    with pytest.raises(GenerationError, match="the GPU failed in cudaDeviceSynchronize: cudaErrorIllegalAddress"):
        memory.clear(Runs(block, 0, 8), 8, 1)
    memory.free(block)
    with pytest.raises(GenerationError, match="the GPU failed in cudaFree: cudaErrorInvalidValue"):
        memory.free(block)


def contents(fake: FakeCuda, cache: KvCache) -> list[np.ndarray]:
    dtypes = (np.float16, np.float32)
    return [
        np.frombuffer(fake.read(region.pointer, int(np.prod(region.shape)) * np.dtype(dtype).itemsize), dtype).reshape(
            region.shape
        )
        for region, dtype in zip(cache.regions(0, 3), dtypes, strict=True)
    ]


def test_a_cache_on_the_gpu_holds_what_one_on_the_host_holds() -> None:
    fake, rng = FakeCuda(), np.random.default_rng(0)
    host = KvCache(TENSORS, max_batch=3, max_capacity=2048, memory=EagerMemory())
    gpu = KvCache(TENSORS, max_batch=3, max_capacity=2048, memory=CudaMemory(Cuda(fake)))
    for cache in (host, gpu):
        cache.lengths[:] = (3, 250, 7)
    for view, region in zip(host.views(0, 3), gpu.regions(0, 3), strict=True):
        view[...] = rng.standard_normal(view.shape)
        fake.write(region.pointer, view.tobytes())
    for work in (
        lambda cache: cache.reserve(CAPACITY_STEP + 1),
        lambda cache: cache.scrub(1, 300),
        lambda cache: cache.copy_row(1, 2, 77),
    ):
        work(host)
        work(gpu)
        for view, array in zip(host.views(0, 3), contents(fake, gpu), strict=True):
            np.testing.assert_array_equal(view, array)
    for mine, whole in zip(gpu.regions(1, 2), gpu.regions(0, 3), strict=True):
        row_bytes = int(np.prod(whole.shape[1:])) * (2 if len(whole.shape) == 4 else 4)
        assert (mine.shape, mine.pointer) == ((2, *whole.shape[1:]), whole.pointer + row_bytes)
    assert fake.allocations == len(TENSORS)  # the smaller arrays are gone
    gpu.release()
    assert fake.allocations == 0


def test_a_cache_that_cannot_grow_is_as_it_was_and_leaks_nothing() -> None:
    fake = FakeCuda(free_bytes=40_000)
    cache = KvCache(TENSORS, max_batch=2, max_capacity=2048, memory=CudaMemory(Cuda(fake)))
    before, regions = fake.free_bytes, cache.regions(0, 2)
    with pytest.raises(GenerationError, match="no memory for a KV cache of 2 rows of 1024 tokens"):
        cache.reserve(1000)
    assert (fake.free_bytes, cache.regions(0, 2), cache.capacity) == (before, regions, CAPACITY_STEP)
