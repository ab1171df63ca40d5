"""KvCache: zero-filled, aligned, grows without losing content."""

import errno
import mmap
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.bundle.manifest import CAPACITY_STEP, IoTensor, cache_capacity
from qwen_aot.runtime.engine.kv_cache import KvCache
from qwen_aot.runtime.engine.kv_memory import Block, HostMemory, Runs


class EagerMemory(HostMemory):
    """Memory that is taken when it is allocated, as a GPU's is."""

    is_lazy = False


TENSORS = (
    IoTensor("past_key_values.0.key", "float16", ("B", 2, "C", 4)),
    IoTensor("past_key_values.0.key_scale", "float32", ("B", 2, "C")),
)


def test_new_memory_is_zero_and_aligned() -> None:
    cache = KvCache(TENSORS, max_batch=3, max_capacity=2048, memory=EagerMemory())
    key, scale = cache.views(0, 3)
    assert (key.shape, key.dtype) == ((3, 2, CAPACITY_STEP, 4), np.float16)
    assert (scale.shape, scale.dtype) == ((3, 2, CAPACITY_STEP), np.float32)
    assert not key.any() and not scale.any()
    assert key.ctypes.data % 64 == 0 and scale.ctypes.data % 64 == 0
    assert cache.nbytes == key.nbytes + scale.nbytes


def test_views_are_the_memory_of_contiguous_rows() -> None:
    cache = KvCache(TENSORS, max_batch=3, max_capacity=2048)
    view = cache.views(1, 2)[0]
    assert view.flags.c_contiguous
    view[:] = 7
    whole = cache.views(0, 3)[0]
    assert not whole[0].any() and (whole[1:] == 7).all()


def test_growth_keeps_content_and_zero_fills_the_rest() -> None:
    cache = KvCache(TENSORS, max_batch=2, max_capacity=2048, memory=EagerMemory())
    cache.lengths[:] = (3, CAPACITY_STEP)
    rng = np.random.default_rng(0)
    before = []
    for view in cache.views(0, 2):
        view[...] = rng.standard_normal(view.shape)
        before.append(view.copy())
    assert cache.reserve(CAPACITY_STEP) is False
    assert cache.reserve(CAPACITY_STEP + 1) is True
    assert cache.capacity == 2 * CAPACITY_STEP
    for view, old in zip(cache.views(0, 2), before, strict=True):
        np.testing.assert_array_equal(view[:, :, :CAPACITY_STEP], old)
        assert not view[:, :, CAPACITY_STEP:].any()


@given(
    max_context=st.integers(1, 5000), prefill_chunk=st.integers(1, 1500), steps=st.lists(st.floats(0, 1), max_size=8)
)
def test_the_capacity_never_passes_the_rotary_tables(max_context: int, prefill_chunk: int, steps: list[float]) -> None:
    positions = cache_capacity(max_context, prefill_chunk)  # what a build gives the tables
    cache = KvCache(TENSORS[1:], max_batch=1, max_capacity=positions, memory=EagerMemory())
    # The longest step: one more than the context, beside an idle row that is full.
    for share in [*steps, 1.0]:
        tokens = round(share * max_context) + 1
        cache.reserve(tokens)
        assert tokens <= cache.capacity <= positions
    with pytest.raises(AssertionError, match=f"tokens asked of a cache of at most {positions}"):
        cache.reserve(positions + 1)


def test_without_memory_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KvCache(TENSORS, max_batch=2, max_capacity=2048, memory=EagerMemory())
    cache.views(0, 2)[0][:] = 5
    zeros = np.zeros
    calls = iter([zeros, None])

    def failing_zeros(*args: object, **kwargs: object) -> object:
        allocate = next(calls)
        if allocate is None:
            raise MemoryError
        return allocate(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(np, "zeros", failing_zeros)
    with pytest.raises(GenerationError, match="no memory for a KV cache of 2 rows of 512 tokens"):
        cache.reserve(CAPACITY_STEP + 1)
    assert cache.capacity == CAPACITY_STEP
    assert [view.shape[2] for view in cache.views(0, 2)] == [CAPACITY_STEP] * 2
    assert (cache.views(0, 2)[0] == 5).all()


def test_a_kernel_that_knows_no_huge_pages_gives_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("qwen_aot.runtime.engine.kv_memory.mmap.mmap", Pages)
    block = HostMemory().allocate(4096)
    assert block.bytes is not None and not block.bytes.any()


def test_growth_whose_copy_fails_leaves_the_cache_as_it_was() -> None:
    class Failing(EagerMemory):
        copies = 0

        def copy(self, source: Runs, target: Runs, width: int, count: int) -> None:
            self.copies += 1
            if self.copies == 2:
                raise GenerationError("the device failed")
            super().copy(source, target, width, count)

    cache = KvCache(TENSORS, max_batch=1, max_capacity=1024, memory=Failing())
    cache.lengths[:] = 3
    before = [region.pointer for region in cache.regions(0, 1)]
    with pytest.raises(GenerationError, match="the device failed"):
        cache.reserve(300)
    assert (cache.capacity, [region.pointer for region in cache.regions(0, 1)]) == (256, before)


def test_more_than_an_address_can_count() -> None:
    tensors = (IoTensor("k", "float32", ("B", 2**31 - 1, "C", 2**31 - 1)),)
    with pytest.raises(GenerationError, match="no memory for a KV cache of 2147483647 rows of 256 tokens"):
        KvCache(tensors, max_batch=2**31 - 1, max_capacity=256)


def test_a_fixed_capacity() -> None:
    cache = KvCache((IoTensor("k", "int8", ("B", 2, 100, 4)),), max_batch=1, max_capacity=256)
    assert cache.capacity == 100
    assert cache.reserve(100) is False
    with pytest.raises(AssertionError, match="101 tokens asked of a cache of at most 100"):
        cache.reserve(101)


def test_bfloat16_is_kept_as_its_bits() -> None:
    cache = KvCache((IoTensor("k", "bfloat16", ("B", 2, "C", 4)),), max_batch=1, max_capacity=256)
    assert cache.views(0, 1)[0].dtype == np.uint16


def test_where_untouched_memory_takes_no_room_nothing_ever_moves() -> None:
    tensors = (IoTensor("k", "float32", ("B", 16, "C", 64)),) * 8
    before = _resident_bytes()
    cache = KvCache(tensors, max_batch=16, max_capacity=32768)
    assert (cache.capacity, cache.nbytes) == (32768, 16 * 8 * 16 * 32768 * 64 * 4)  # 16 GiB
    regions = cache.regions(0, 16)
    cache.lengths[:] = 100
    for view in cache.views(0, 16):
        assert not view[3, :, :100].any()
        view[3, :, :100] = 7
    cache.copy_row(3, 9, 100)
    cache.scrub(9, 103)
    # Two rows of 100 tokens in 8 arrays are 26 MB, in whole pages; of the 16 GiB nothing else has been touched.
    assert _resident_bytes() - before < 60 << 20
    assert cache.reserve(32768) is False
    assert cache.regions(0, 16) == regions


def test_a_system_that_refuses_so_many_addresses_gets_a_cache_that_grows() -> None:
    class Limited(HostMemory):
        def allocate(self, nbytes: int) -> Block:
            if nbytes > 1 << 20:
                raise MemoryError
            return super().allocate(nbytes)

    cache = KvCache(TENSORS, max_batch=3, max_capacity=1 << 20, memory=Limited())
    assert cache.capacity == CAPACITY_STEP
    assert cache.reserve(CAPACITY_STEP + 1) is True


@given(
    memory=st.sampled_from([HostMemory, EagerMemory]),
    lengths=st.tuples(*[st.integers(0, CAPACITY_STEP)] * 3),
    rows=st.permutations(range(3)),
    share=st.floats(0, 1),
)
def test_a_copied_row_holds_that_beginning_and_the_others_are_as_they_were(
    memory: type[HostMemory], lengths: tuple[int, int, int], rows: list[int], share: float
) -> None:
    cache = KvCache(TENSORS, max_batch=3, max_capacity=2048, memory=memory())
    cache.lengths[:] = lengths
    rng = np.random.default_rng(0)
    for view in cache.views(0, 3):
        view[:, :, :CAPACITY_STEP] = rng.standard_normal((3, 2, CAPACITY_STEP, *view.shape[3:]))
    expected = [view.copy() for view in cache.views(0, 3)]
    source, target, _ = rows
    length = int(share * lengths[source])
    cache.copy_row(source, target, length)
    for array, view in zip(expected, cache.views(0, 3), strict=True):
        array[target, :, :length] = array[source, :, :length]
        np.testing.assert_array_equal(view, array)
    assert cache.lengths.tolist() == [length if row == target else lengths[row] for row in range(3)]


def test_scrubbing_clears_what_a_step_may_have_written_and_no_more() -> None:
    cache = KvCache(TENSORS, max_batch=2, max_capacity=2048)
    cache.lengths[:] = (3, 5)
    for view in cache.views(0, 2):
        view[:, :, :20] = 1
    cache.scrub(1, 9)
    cache.scrub(0, 3)
    for view in cache.views(0, 2):
        assert (view[0, :, :20] == 1).all()
        assert (view[1, :, :5] == 1).all() and not view[1, :, 5:9].any() and (view[1, :, 9:20] == 1).all()
    with pytest.raises(AssertionError, match="2049 slots of a row of 2048"):
        cache.scrub(0, 2049)


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_a_cache_that_was_released_refuses_everything() -> None:
    cache = KvCache(TENSORS, max_batch=2, max_capacity=2048, memory=EagerMemory())
    cache.release()
    calls: list[Callable[[], object]] = [
        lambda: cache.reserve(1),
        lambda: cache.reserve(2000),
        lambda: cache.scrub(0, 1),
        lambda: cache.copy_row(0, 1, 0),
        lambda: cache.copy_row(0, 1, 1),
        lambda: cache.regions(0, 1),
        lambda: cache.views(0, 1),
    ]
    for call in calls:
        with pytest.raises(GenerationError, match="the engine is closed; open the bundle again"):
            call()
    cache.release()
    assert cache.nbytes == 0
