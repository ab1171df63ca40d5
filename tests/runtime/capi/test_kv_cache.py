"""The C library's KV cache: zero-filled, grows without losing content, copies and clears rows and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_aot.runtime.bundle.manifest import CAPACITY_STEP, IoTensor, cache_capacity
from qwen_aot.runtime.engine.kv_cache import KvCache
from qwen_aot.runtime.engine.kv_memory import HostMemory
from tests.runtime.capi.engines import CONTEXT_FULL, ENGINE_FAILED, NO_TYPES, OUT_OF_MEMORY, Dialog, tensors
from tests.runtime.capi.native import Native

TENSORS = (
    IoTensor("past_key_values.0.key", "float16", ("B", 2, "C", 4)),
    IoTensor("past_key_values.0.key_scale", "float32", ("B", 2, "C")),
)


@pytest.fixture(scope="module")
def dialog(native: Native) -> Iterator[Dialog]:
    with Dialog(native.program("kv_cache", flags=NO_TYPES)) as dialog:
        yield dialog


def open_cache(dialog: Dialog, inputs: tuple[IoTensor, ...] = TENSORS, **options: Any) -> Any:
    """What it answers; memory is a GPU's unless said otherwise."""
    request = {"is_lazy": False, "is_host": False, "max_batch": 3, "max_capacity": 2048, **options}
    return dialog.ask("open", inputs=tensors(inputs), **request)


def content(dialog: Dialog) -> list[np.ndarray]:
    """Of each array: bytes [max_batch, heads, C, bytes of a slot]."""
    return [np.frombuffer(bytes.fromhex(array), np.uint8) for array in dialog.want("content")["arrays"]]


def shaped(arrays: list[np.ndarray], capacity: int, rows: int = 3) -> list[np.ndarray]:
    return [array.reshape(rows, 2, capacity, -1).copy() for array in arrays]


def test_new_memory_is_zero(dialog: Dialog) -> None:
    seen = open_cache(dialog)
    assert (seen["capacity"], seen["row_bytes"]) == (CAPACITY_STEP, [2 * CAPACITY_STEP * 8, 2 * CAPACITY_STEP * 4])
    assert seen["bytes"] == 3 * sum(seen["row_bytes"]) and seen["lengths"] == [0, 0, 0]
    assert not any(array.any() for array in content(dialog))


def test_growth_keeps_content_and_zero_fills_the_rest(dialog: Dialog) -> None:
    open_cache(dialog)
    for row, length in enumerate((3, CAPACITY_STEP, 0)):
        dialog.want("set_length", row=row, length=length)
    dialog.want("fill")
    before = shaped(content(dialog), CAPACITY_STEP)
    assert dialog.want("reserve", tokens=CAPACITY_STEP)["capacity"] == CAPACITY_STEP
    assert dialog.want("reserve", tokens=CAPACITY_STEP + 1)["capacity"] == 2 * CAPACITY_STEP
    for array, old in zip(shaped(content(dialog), 2 * CAPACITY_STEP), before, strict=True):
        np.testing.assert_array_equal(array[:, :, :CAPACITY_STEP], old)
        assert not array[:, :, CAPACITY_STEP:].any()
    # At least a quarter more each time, so that a token costs the copy of five at most.
    dialog.want("reserve", tokens=2000)
    assert dialog.want("reserve", tokens=2001)["capacity"] == 2048


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    max_context=st.integers(1, 5000), prefill_chunk=st.integers(1, 1500), steps=st.lists(st.floats(0, 1), max_size=8)
)
def test_capacities_are_those_of_the_python_cache(
    dialog: Dialog, max_context: int, prefill_chunk: int, steps: list[float]
) -> None:
    class EagerMemory(HostMemory):
        is_lazy = False

    limit = cache_capacity(max_context, prefill_chunk)
    python = KvCache(TENSORS, max_batch=1, max_capacity=limit, memory=EagerMemory())
    assert open_cache(dialog, max_batch=1, max_capacity=limit)["capacity"] == python.capacity
    for share in [*steps, 1.0]:
        tokens = round(share * max_context) + 1
        python.reserve(tokens)
        assert dialog.want("reserve", tokens=tokens)["capacity"] == python.capacity
    refused = dialog.ask("reserve", tokens=limit + 1)
    assert refused["status"] == CONTEXT_FULL and f"of a cache of at most {limit}" in refused["message"]


@pytest.mark.parametrize("failing_call", range(4))
def test_growth_that_fails_leaves_the_cache_as_it_was(dialog: Dialog, failing_call: int) -> None:
    """Two allocations, then two copies: each may fail."""
    before = open_cache(dialog)
    dialog.want("set_length", row=0, length=3)
    dialog.want("fill")
    old = content(dialog)
    dialog.want("fail_after", calls=failing_call)
    failed = dialog.ask("reserve", tokens=CAPACITY_STEP + 1)
    if failing_call < 2:
        assert failed["status"] == OUT_OF_MEMORY
        assert "no memory for a KV cache of 3 rows of 512 tokens (0 MiB): use a shorter text" in failed["message"]
    else:
        assert (failed["status"], failed["message"]) == (ENGINE_FAILED, "the device failed")
    after = dialog.want("fail_after", calls=-1)
    assert after["addresses"] == before["addresses"] and after["capacity"] == CAPACITY_STEP
    for array, was in zip(content(dialog), old, strict=True):
        np.testing.assert_array_equal(array, was)
    assert dialog.want("reserve", tokens=CAPACITY_STEP + 1)["capacity"] == 512  # and then it goes on


def test_more_than_an_address_can_count(dialog: Dialog) -> None:
    huge = (IoTensor("past_key_values.0.key", "float32", ("B", 2**31 - 1, "C", 2**31 - 1)),)
    failed = open_cache(dialog, huge, max_batch=2**20, max_capacity=256)
    assert failed["status"] == OUT_OF_MEMORY
    assert "1048576 rows of 256 tokens (more bytes than there are addresses)" in failed["message"]


def test_a_fixed_capacity(dialog: Dialog) -> None:
    fixed = (IoTensor("past_key_values.0.key", "int8", ("B", 2, 100, 4)),)
    assert open_cache(dialog, fixed, max_batch=1, max_capacity=256)["capacity"] == 100
    assert dialog.want("reserve", tokens=100)["bytes"] == 800
    assert "101 tokens was asked of a cache of at most 100" in dialog.ask("reserve", tokens=101)["message"]


def test_where_untouched_memory_takes_no_room_nothing_ever_moves(dialog: Dialog) -> None:
    inputs = tuple(IoTensor(f"past_key_values.{i}.key", "float32", ("B", 16, "C", 64)) for i in range(8))
    options = {"max_batch": 16, "max_capacity": 32768, "is_host": True}
    before = open_cache(dialog, inputs, **options)
    assert (before["capacity"], before["bytes"]) == (32768, 16 * 8 * 16 * 32768 * 64 * 4)  # 16 GiB
    dialog.want("touch", row=3, bytes=100 * 64 * 4)
    dialog.want("set_length", row=3, length=100)
    dialog.want("copy_row", row=3, target=9, length=100)
    after = dialog.want("scrub", row=9, end=103)
    # Two rows of 100 tokens in 8 arrays are 26 MB, in whole pages; of the 16 GiB nothing else has been touched.
    assert after["resident"] - before["resident"] < 60 << 20
    assert dialog.want("reserve", tokens=32768)["addresses"] == before["addresses"]


def test_a_system_that_refuses_so_many_addresses_gets_a_cache_that_grows(dialog: Dialog) -> None:
    seen = open_cache(dialog, max_capacity=1 << 20, is_lazy=True, limit=1 << 20)
    assert seen["capacity"] == CAPACITY_STEP
    assert "can't be reserved whole and will grow by copying: there is no memory for a KV cache" in seen["warning"]
    assert dialog.want("reserve", tokens=CAPACITY_STEP + 1)["capacity"] == 2 * CAPACITY_STEP
    whole = open_cache(dialog, max_capacity=2048, is_lazy=True)
    assert (whole["capacity"], whole["warning"]) == (2048, "")
    assert open_cache(dialog)["warning"] == ""  # where growing is the rule


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    is_host=st.booleans(),
    lengths=st.tuples(*[st.integers(0, CAPACITY_STEP)] * 3),
    rows=st.permutations(range(3)),
    share=st.floats(0, 1),
    written=st.integers(0, 40),
)
def test_copies_and_scrubbing_change_those_slots_and_no_others(
    dialog: Dialog, is_host: bool, lengths: tuple[int, int, int], rows: list[int], share: float, written: int
) -> None:
    open_cache(dialog, max_capacity=CAPACITY_STEP, is_host=is_host)
    dialog.want("fill")
    for row, length in enumerate(lengths):
        dialog.want("set_length", row=row, length=length)
    expected = shaped(content(dialog), CAPACITY_STEP)
    source, target, other = rows
    length = int(share * lengths[source])
    seen = dialog.want("copy_row", row=source, target=target, length=length)
    assert seen["lengths"] == [length if row == target else lengths[row] for row in range(3)]
    end = min(lengths[other] + written, CAPACITY_STEP)
    dialog.want("scrub", row=other, end=end)
    for array in expected:
        array[target, :, :length] = array[source, :, :length]
        array[other, :, lengths[other] : end] = 0
    for array, want in zip(shaped(content(dialog), CAPACITY_STEP), expected, strict=True):
        np.testing.assert_array_equal(array, want)


def test_a_copy_that_fails_leaves_the_target_empty(dialog: Dialog) -> None:
    open_cache(dialog)
    dialog.want("set_length", row=0, length=5)
    dialog.want("set_length", row=1, length=7)
    dialog.want("fail_after", calls=1)
    assert dialog.ask("copy_row", row=0, target=1, length=4)["status"] == ENGINE_FAILED
    assert dialog.want("fail_after", calls=-1)["lengths"] == [5, 0, 0]


def test_the_program_sees_what_would_damage_a_device(native: Native) -> None:
    """The negative control of the checked memory: a copy past the end of a row ends the program."""
    seen = "runs pass the end of an allocation|runs of a wrong shape"
    with pytest.raises(AssertionError, match=seen), Dialog(native.program("kv_cache", flags=NO_TYPES)) as dialog:
        open_cache(dialog, max_batch=2, max_capacity=256)
        dialog.ask("copy_row", row=0, target=1, length=CAPACITY_STEP + 1)


@pytest.mark.deep
def test_the_cache_is_clean_under_sanitizers(native_folder: Path) -> None:
    with Dialog(Native(native_folder, "address").program("kv_cache", flags=NO_TYPES)) as dialog:
        for is_host in (True, False):
            open_cache(dialog, is_host=is_host)
            dialog.want("fill")
            dialog.want("set_length", row=1, length=CAPACITY_STEP)
            dialog.want("copy_row", row=1, target=2, length=CAPACITY_STEP)
            dialog.want("set_length", row=0, length=CAPACITY_STEP - 3)
            dialog.want("scrub", row=0, end=CAPACITY_STEP)
            dialog.want("reserve", tokens=2048)
