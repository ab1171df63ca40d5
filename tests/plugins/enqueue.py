"""Runs `enqueue` of the plugin library under the double of the CUDA driver (tests/plugins/driver), as TensorRT would.

`run` is called in a process of its own, since the double is a library named libcuda.so.1: from then on, whatever is
loaded there takes it for the driver.
"""

import ctypes
import functools
import pickle
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_aot.plugins.launch import gqa_workspace, linear_workspace, moe_workspace, num_splits
from tests.plugins.any_step import Step
from tests.plugins.driver.execution import DTYPES, LAUNCH_FAILED, Code, Executor, Gpu, Memory, Recorded, Region
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.harness import POISON, Call, Harness, prepare
from tests.plugins.linear_cases import LinearStep

DRIVER = Path(__file__).parent / "driver"
GUARD_BYTES = 4096  # after the workspace
GLOBAL_CAPTURE = 0  # CU_STREAM_CAPTURE_MODE_GLOBAL, a thread's usual mode


@dataclass(frozen=True, slots=True)
class Paths:
    """What the other process loads.

    Attributes:
        driver: As `compile_driver` made it.
        harness: Likewise.
        library: The plugins'.
        kernels: The folder that `plugins.aot` wrote.
        ptx_interpreter: The library of tests/plugins/ptx, where PTX is to be executed.
    """

    driver: Path
    harness: Path
    library: Path
    kernels: Path
    ptx_interpreter: Path | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """The nth call of a driver function, counted from 1, fails with a CUresult."""

    function: str
    nth: int = 1
    result: int = LAUNCH_FAILED


@dataclass(frozen=True, slots=True)
class Enqueue:
    """One call of `enqueue`.

    Attributes:
        batch: B of a MoeStep or LinearStep, whose tokens are [B, S].
        gpu: Which of `run`'s, in whose context it happens.
        is_copied: Present lies elsewhere than past, which the plugin must refuse, but where the builder times it.
        code: What of the kernels is executed; None: the launches are only looked at.
        is_captured: The stream is captured meanwhile, and what was launched is replayed.
        in_new_context: Its context was destroyed before, and another one stands at its address.
        is_cloned: The tactic is that of the first step, given to the plugin from which this one was cloned.
    """

    step: Step
    batch: int = 1
    fault: Fault | None = None
    gpu: int = 0
    is_copied: bool = False
    code: Code | None = "source"
    is_captured: bool = False
    in_new_context: bool = False
    is_cloned: bool = False


@dataclass(slots=True)
class Outcome:
    """What became of one `Enqueue`: `status` is what `onShapeChange` or `enqueue` returned, `calls` the driver's."""

    status: int
    log: str
    calls: list[str]
    misuses: list[str]
    launches: list[Recorded]
    tensors: dict[str, torch.Tensor]


def compile_driver(folder: Path, headers: Sequence[Path], *definitions: str) -> tuple[Path, Path]:
    """The double of the driver and the harness, compiled into `folder`.

    Args:
        folder: Where to write.
        headers: Include folders.
        definitions: Macros of the double, which say what it lacks.
    """
    driver, harness = folder / "libcuda.so.1", folder / "libharness.so"
    include = [flag for path in headers for flag in ("-isystem", str(path))]
    common = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", *include]
    sources = [str(DRIVER / name) for name in ("double.cpp", "refused.cpp")]
    for command in (
        [*common, *(f"-D{name}" for name in definitions), "-Wl,-soname,libcuda.so.1", *sources, "-o", str(driver)],
        [*common, str(DRIVER / "harness.cpp"), "-o", str(harness), "-ldl"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return driver, harness


# What follows runs in the other process.


class _Host:
    """The double, the harness and the library, loaded into this process."""

    def __init__(self, paths: Paths) -> None:
        self.executor = Executor(paths.driver, paths.kernels, paths.ptx_interpreter)
        self.harness = Harness(paths.harness, paths.library)


@functools.cache
def _host(paths: Paths) -> _Host:
    return _Host(paths)


def _buffer_bytes(step: Step, gpu: Gpu) -> dict[str, int]:
    """Bytes of each part of the workspace."""
    if isinstance(step, GqaStep):
        cache, batch = "int8" if step.is_int8 else "same", len(step.lengths)
        facts = (step.num_kv_heads, step.capacity, step.group, cache, gpu.multiprocessors, step.tactic)
        splits = num_splits(batch, *facts)
        heads = {"num_heads": step.num_heads, "head_dim": step.head_dim}
        shapes = gqa_workspace(batch=batch, steps=step.steps, splits=splits, dtype=step.dtype, is_timed=True, **heads)
    elif isinstance(step, LinearStep):
        shapes = linear_workspace(num_tokens=step.num_tokens, rows=step.rows, splits=step.splits)
    else:
        shapes = moe_workspace(
            num_tokens=step.num_tokens,
            k=step.tensors["expert_ids"].shape[1],
            num_experts=step.num_experts,
            hidden_size=step.hidden_size,
            inner_size=step.inner_size,
            dtype=step.dtype,
            is_timed=True,
        )
    return {name: torch.Size(shape).numel() * DTYPES[dtype].itemsize for name, (shape, dtype) in shapes.items()}


def run(paths: Paths, pickled: bytes) -> bytes:
    """Enqueues one plugin again and again, in one workspace of the size of a profile that just holds all calls.

    Args:
        paths: What to load, once.
        pickled: (enqueues, gpus, phase): phase "runtime" puts the plugin through a plan first, "build" takes the one
            that the builder times. Pickled here and not by the process pool, which would share tensors with this
            process.

    Returns:
        A pickled list of `Outcome`, one for each enqueue.
    """
    enqueues, gpus, phase = pickle.loads(pickled)
    host = _host(paths)
    harness = host.harness
    num_modules = host.executor.driver.double_count_modules()
    plugin = harness.create(enqueues[0].step)
    calls = [
        prepare(enqueue.step, torch.device("cpu"), batch=enqueue.batch, is_copied=enqueue.is_copied)
        for enqueue in enqueues
    ]
    try:
        size = harness.configure(plugin, calls)
        if enqueues[0].is_cloned:
            harness.choose_tactic(plugin, enqueues[0].step)
        plugin = {"runtime": harness.restore, "build": harness.attach}[phase](plugin)
        # Aligned as TensorRT's is.
        backing = torch.full((256 + size + GUARD_BYTES,), POISON, dtype=torch.uint8)
        workspace = Region(-(-backing.data_ptr() // 256) * 256, size)
        contexts = [host.executor.create_context(gpu) for gpu in gpus]
        outcomes = []
        for enqueue, call in zip(enqueues, calls, strict=True):
            backing.fill_(POISON)
            outcomes.append(_enqueue(host, plugin, enqueue, call, contexts, gpus, workspace))
            guard = backing[workspace.address + size - backing.data_ptr() :]
            assert (guard == POISON).all(), "something was written beyond the workspace"
    finally:
        harness.destroy(plugin)
    misuses = host.executor.take_misuses()
    assert not misuses, misuses
    left = host.executor.driver.double_count_modules() - num_modules
    assert left == 0, f"{left} modules stay loaded after the plugin that used them"
    return pickle.dumps(outcomes)


def destroy_during_capture(paths: Paths) -> tuple[int, list[str]]:
    """The last plugin goes while a stream is captured.

    Returns:
        What `double_end_capture` said, and the misuses.
    """
    host, step = _host(paths), GqaStep(lengths=[(7, 1)], steps=1)
    plugin = host.harness.create(step)
    call = prepare(step, torch.device("cpu"))
    workspace = torch.empty(host.harness.configure(plugin, [call]) + 256, dtype=torch.uint8)
    plugin = host.harness.restore(plugin)
    _, stream = host.executor.create_context(Gpu())
    assert host.harness.enqueue(plugin, call, -(-workspace.data_ptr() // 256) * 256, stream) == 0
    assert host.executor.driver.double_count_modules() > 0
    host.executor.take_misuses()
    host.executor.driver.double_begin_capture(stream)
    host.harness.destroy(plugin)
    captured = int(host.executor.driver.double_end_capture())
    assert host.executor.driver.double_count_modules() == 0
    return captured, host.executor.take_misuses()


def _enqueue(
    host: _Host,
    plugin: ctypes.c_void_p,
    enqueue: Enqueue,
    call: Call,
    contexts: Sequence[tuple[ctypes.c_void_p, ctypes.c_void_p]],
    gpus: Sequence[Gpu],
    workspace: Region,
) -> Outcome:
    context, stream = contexts[enqueue.gpu]
    executor, harness = host.executor, host.harness
    executor.driver.double_set_current(context)
    if enqueue.in_new_context:
        executor.driver.double_replace_context(context)
    if not enqueue.is_cloned:
        harness.choose_tactic(plugin, enqueue.step)
    regions = {name: Region.of(tensor) for name, tensor in call.named.items()}
    memory = Memory(regions, workspace, _buffer_bytes(enqueue.step, gpus[enqueue.gpu]))
    harness.take_log()
    executor.begin(memory, stream, code=enqueue.code)
    if enqueue.fault is not None:
        executor.driver.double_fail(enqueue.fault.function.encode(), enqueue.fault.nth, enqueue.fault.result)
    if enqueue.is_captured:
        executor.driver.double_begin_capture(stream)
    status = harness.enqueue(plugin, call, workspace.address, stream)
    executor.driver.double_fail(b"", 0, 0)
    if enqueue.is_captured:
        assert not executor.end(), "a launch ran while it was captured"
        captured = executor.driver.double_end_capture()
        assert captured > 0 if status == 0 else captured <= 0, f"status {status}, {captured} launches captured"
        executor.driver.double_replay()  # an error is raised below
    assert executor.driver.double_capture_mode() == GLOBAL_CAPTURE, "the thread may do more than before"
    launches = executor.end()
    return Outcome(status, harness.take_log(), executor.take_calls(), executor.take_misuses(), launches, call.named)
