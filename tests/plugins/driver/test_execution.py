"""What the executor makes of correct launches, and that it notices each thing that a launch can have wrong."""

import ctypes
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugins.bounds import assert_close
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.driver.execution import Executor, Gpu, Memory, Region
from tests.plugins.gqa_cases import GqaStep

if not IS_INTERPRETED:
    pytest.skip("launches are executed in Triton's interpreter only", allow_module_level=True)

STEP = GqaStep(lengths=[(600, 1), (3, 1), (530, 1)], steps=1, group=2)  # two parts, one, and two
BUFFERS = ("query", "partial", "partial_lse")


@pytest.fixture(scope="module")
def kernels(plugin_build: Path) -> Path:
    return plugin_build / "build" / "kernels"


@dataclass
class Call:
    """One cuLaunchKernel, from `plugins.launch`."""

    entry: dict[str, Any]
    values: dict[str, Any]
    grid: tuple[int, ...]
    shared_bytes: int
    scratch: int = 0


def exchange(call: Call, one: str, other: str) -> None:
    call.values[one], call.values[other] = call.values[other], call.values[one]


def move(call: Call, name: str, by: int) -> None:
    call.values[name] = ctypes.c_void_p(call.values[name].value + by)


# What is done to the three calls (rotate, decode, reduce), and what is said then.
NOTICED: dict[str, tuple[Callable[[list[Call]], Any], str]] = {
    "block": (lambda calls: calls[0].entry.update(num_warps=2), "block of 64 x 1 x 1 threads"),
    "shared memory": (lambda calls: setattr(calls[1], "shared_bytes", 16), "16 bytes of shared memory"),
    "scratch memory": (lambda calls: setattr(calls[1], "scratch", 16), "scratch memory"),
    "alignment": (lambda calls: move(calls[0], "query_ptr", 8), r"query_ptr is \d+, not a multiple of 16"),
    "no tensor": (lambda calls: move(calls[0], "position_ids_ptr", 8), "position_ids_ptr points to no tensor's start"),
    "workspace's end": (lambda calls: move(calls[1], "partial_lse_ptr", 16), r"doesn't lie in its \d+ bytes"),
    "overlap": (
        lambda calls: calls[1].values.update(partial_lse_ptr=calls[1].values["partial_ptr"]),
        "partial_lse overlaps partial",
    ),
    "moved": (lambda calls: move(calls[1], "query_ptr", 16), "query moves between launches"),
    "grid too large": (lambda calls: setattr(calls[0], "grid", (4, 1)), "beyond the end of|in none of"),
    "grid too small": (lambda calls: setattr(calls[2], "grid", (4, 2)), "256 elements were not written"),
    "order of pointers": (lambda calls: exchange(calls[1], "key_ptr", "value_ptr"), r"off by [\d.]+ units"),
    "order of sizes": (lambda calls: exchange(calls[1], "num_heads", "group"), "off by|beyond the end of|in none of"),
}


def run_calls(driver: Path, kernels: Path, name: str) -> bytes:
    """In the other process: the output, pickled."""
    executor = Executor(driver, kernels)
    _, stream = executor.create_context(Gpu(multiprocessors=64))
    tensors, launches = STEP.prepare(torch.device("cpu"))
    # `prepare` makes a tensor of each part of the workspace; here they lie in one.
    sizes = [Region.of(tensors[part]).bytes for part in BUFFERS]
    workspace = torch.full((sum(sizes) + 16,), 0xFF, dtype=torch.uint8)
    start = workspace.data_ptr() + -workspace.data_ptr() % 16
    parts, at = {}, start
    for part, size in zip(BUFFERS, sizes, strict=True):
        parts[tensors[part].data_ptr()], at = at, at + size
    regions = {key: Region.of(tensor) for key, tensor in tensors.items() if tensor is not None and key not in BUFFERS}
    memory = Memory(regions, Region(start, at - start), dict(zip(BUFFERS, sizes, strict=True)))

    def value(kind: str, argument: Any) -> Any:
        if kind == "fp32":
            return ctypes.c_float(argument)
        if kind == "i32":
            return ctypes.c_int32(argument)
        address = 0 if argument is None else argument.data_ptr()
        return ctypes.c_void_p(parts.get(address, address))

    calls = []
    for launch in launches:
        entry = next(entry for _, entry in executor.entries.values() if entry["name"] == launch.variant.name)
        values = {of["name"]: value(of["type"], launch.arguments[of["name"]]) for of in entry["arguments"]}
        grid = launch.variant.grid(launch.sizes)
        calls.append(Call(dict(entry), values, grid, entry["shared_bytes"]))
    if name:
        NOTICED[name][0](calls)

    executor.begin(memory, stream)
    for call in calls:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        image = (kernels / "sm_89" / call.entry["file"]).read_bytes()
        assert executor.driver.cuModuleLoadData(ctypes.byref(module), image) == 0
        found = executor.driver.cuModuleGetFunction(ctypes.byref(function), module, call.entry["symbol"].encode())
        assert found == 0
        values = [*call.values.values(), ctypes.c_void_p(call.scratch), ctypes.c_void_p()]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        grid = call.grid + (1,) * (3 - len(call.grid))
        block = (32 * call.entry["num_warps"], 1, 1)
        if executor.driver.cuLaunchKernel(function, *grid, *block, call.shared_bytes, stream, pointers, None):
            break
    misuses = executor.take_misuses()
    assert not misuses, misuses
    executor.end()
    return pickle.dumps(tensors["output"])


def check(driver: Path, kernels: Path, name: str) -> None:
    assert_close(pickle.loads(run_calls(driver, kernels, name)), STEP.expected()["output"])


def test_correct_launches_give_the_reference(kernels, driver_files, other_process):
    other_process.submit(check, driver_files[0], kernels, "").result()


@pytest.mark.parametrize("name", NOTICED)
def test_noticed(name, kernels, driver_files, other_process):
    with pytest.raises(Exception, match=NOTICED[name][1]):
        other_process.submit(check, driver_files[0], kernels, name).result()
