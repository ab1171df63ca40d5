"""Runs `enqueue` of the plugin library under the double of the CUDA driver (tests/plugins/driver), as TensorRT would.

`run` is called in a process of its own, since the double is a library named libcuda.so.1: from then on, whatever is
loaded there takes it for the driver.
"""

import ctypes
import functools
import pickle
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plugins.launch import gqa_workspace, moe_workspace, num_splits
from tests.plugins.driver.execution import DTYPES, LAUNCH_FAILED, Executor, Gpu, Memory, Recorded, Region
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.moe_cases import MoeStep

DRIVER = Path(__file__).parent / "driver"
GUARD_BYTES = 4096  # after the workspace
POISON = 0xFF  # NaN in every floating-point type, -1 in integers

# nvinfer1::DataType and nvinfer1::PluginFieldType.
_DATA_TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.bfloat16: 7,
    torch.int64: 8,
}
_FIELD_TYPES: dict[type, tuple[int, Any]] = {float: (1, ctypes.c_float), int: (5, ctypes.c_int32)}


@dataclass(frozen=True, slots=True)
class Paths:
    """`driver` and `harness` as `compile_driver` made them; `kernels` is the folder that `plugins.aot` wrote."""

    driver: Path
    harness: Path
    library: Path
    kernels: Path


@dataclass(frozen=True, slots=True)
class Fault:
    """The nth call of a driver function, counted from 1, fails with LAUNCH_FAILED."""

    function: str
    nth: int = 1


@dataclass(frozen=True, slots=True)
class Enqueue:
    """One call of `enqueue`.

    Attributes:
        batch: B of a MoeStep, whose tokens are [B, S].
        gpu: Which of `run`'s, in whose context it happens.
        is_copied: Present lies elsewhere than past, which the plugin must refuse, but where the builder times it.
        is_executed: Else the launches are only looked at.
        in_new_context: Its context was destroyed before, and another one stands at its address.
    """

    step: GqaStep | MoeStep
    batch: int = 1
    fault: Fault | None = None
    gpu: int = 0
    is_copied: bool = False
    is_executed: bool = True
    in_new_context: bool = False


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


class _Tensor(ctypes.Structure):  # these three: driver/harness.cpp
    _fields_ = (("type", ctypes.c_int32), ("rank", ctypes.c_int32), ("dims", ctypes.c_int64 * 8))


class _Range(ctypes.Structure):
    _fields_ = (("min", _Tensor), ("opt", _Tensor), ("max", _Tensor))


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("data", ctypes.c_void_p),
    )


class _Host:
    """The double, the harness and the library, loaded into this process."""

    def __init__(self, paths: Paths) -> None:
        self.executor = Executor(paths.driver, paths.kernels)
        self.harness = ctypes.CDLL(str(paths.harness))
        for name in ("harness_load", "harness_create", "harness_attach", "harness_restore"):
            getattr(self.harness, name).restype = ctypes.c_void_p
        self.harness.harness_configure.restype = ctypes.c_int64
        self.harness.harness_take_log.restype = ctypes.c_char_p
        self.library = self._made(self.harness.harness_load(str(paths.library).encode()))

    def _made(self, handle: int | None) -> ctypes.c_void_p:
        assert handle, self.take_log()
        return ctypes.c_void_p(handle)

    def take_log(self) -> str:
        return str(self.harness.harness_take_log().decode())

    def create_plugin(self, name: str, attributes: Mapping[str, int | float]) -> ctypes.c_void_p:
        fields, kept = [], []
        for key, value in attributes.items():
            number, make = _FIELD_TYPES[type(value)]
            kept.append(make(value))
            fields.append(_Field(key.encode(), number, 1, ctypes.addressof(kept[-1])))
        return self._made(self.harness.harness_create(self.library, name.encode(), _array(_Field, fields), len(fields)))

    def attach(self, plugin: ctypes.c_void_p) -> ctypes.c_void_p:
        """The plugin as the builder times it; the given one is no more."""
        return self._made(self.harness.harness_attach(plugin))

    def restore(self, plugin: ctypes.c_void_p) -> ctypes.c_void_p:
        """The plugin, gone through a plan into an execution context; the given one is no more."""
        return self._made(self.harness.harness_restore(plugin))


@functools.cache
def _host(paths: Paths) -> _Host:
    return _Host(paths)


def _array(kind: Any, values: Iterable[Any]) -> Any:
    values = list(values)
    return (kind * len(values))(*values)


def _pointers(tensors: Iterable[torch.Tensor]) -> Any:
    return _array(ctypes.c_void_p, [tensor.data_ptr() for tensor in tensors])


def _describe(dtype: torch.dtype, dims: Sequence[int]) -> _Tensor:
    return _Tensor(_DATA_TYPES[dtype], len(dims), (ctypes.c_int64 * 8)(*dims))


def _descriptions(tensors: Iterable[torch.Tensor]) -> Any:
    return _array(_Tensor, [_describe(tensor.dtype, tensor.shape) for tensor in tensors])


def _ranges(calls: Sequence[Sequence[torch.Tensor]]) -> Any:
    """A profile that just holds the shapes of some calls; `opt` is the first one's."""
    ranges = []
    for tensors in zip(*calls, strict=True):
        dtype, shapes = tensors[0].dtype, [tensor.shape for tensor in tensors]
        edges = [[edge(sizes) for sizes in zip(*shapes, strict=True)] for edge in (min, max)]
        ranges.append(_Range(*(_describe(dtype, dims) for dims in (edges[0], shapes[0], edges[1]))))
    return _array(_Range, ranges)


@dataclass
class _Call:
    """Inputs and outputs of one `enqueue`, in the plugin's order; `named` has them as tests name them."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    named: dict[str, torch.Tensor]


def _poisoned_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor.contiguous().view(torch.uint8), POISON).view(tensor.dtype)


def _prepare(enqueue: Enqueue) -> _Call:
    step = enqueue.step
    if isinstance(step, GqaStep):
        named = {name: tensor.clone() for name, tensor in step.tensors.items() if tensor is not None}
        order = ("qkv", "key", "value", "cos", "sin", "position_ids", "cache_length", "new_tokens")
        cache = [name for name in ("key", "value", "key_scale", "value_scale") if name in named]
        inputs = [named[name] for name in (*order, *cache[2:])]
        batch, steps, _ = named["qkv"].shape
        output = torch.empty(batch, steps, step.num_heads * step.head_dim, dtype=named["qkv"].dtype)
        present = [named[name].clone() if enqueue.is_copied else named[name] for name in cache]
        named["output"] = _poisoned_like(output)
        return _Call(inputs, [named["output"], *present], named)
    steps = step.num_tokens // enqueue.batch
    assert step.num_tokens == enqueue.batch * steps
    named = {name: tensor.clone() for name, tensor in step.tensors.items()}
    named_inputs = [named[name] for name in ("hidden", "expert_ids", "expert_weights")]
    inputs = [tensor.view(enqueue.batch, steps, tensor.shape[-1]) for tensor in named_inputs]
    for part in ("codes", "scale", "zero"):
        for name, weights in (("gate_up", step.gate_up), ("down", step.down)):
            tensor = getattr(weights, part)
            if tensor is not None:
                named[name if part == "codes" else f"{name}_{part}"] = tensor
                inputs.append(tensor)
    named["output"] = _poisoned_like(named["hidden"])
    return _Call(inputs, [named["output"].view(enqueue.batch, steps, step.hidden_size)], named)


def _plugin(step: GqaStep | MoeStep) -> tuple[str, dict[str, int | float]]:
    """A plugin's name and attributes."""
    if isinstance(step, GqaStep):
        heads = {"num_heads": step.num_heads, "num_kv_heads": step.num_kv_heads, "head_dim": step.head_dim}
        return "QwenGQA", {**heads, "cache_bits": 8 if step.is_int8 else 16, "scale": float(step.scale)}
    sizes = {"num_experts": step.num_experts, "experts_per_token": step.tensors["expert_ids"].shape[1]}
    return "QwenMoE", {**sizes, "weight_bits": step.gate_up.bits, "has_zeros": int(step.gate_up.zero is not None)}


def _buffer_bytes(step: GqaStep | MoeStep, gpu: Gpu) -> dict[str, int]:
    """Bytes of each part of the workspace."""
    if isinstance(step, GqaStep):
        cache, batch = "int8" if step.is_int8 else "same", len(step.lengths)
        splits = num_splits(batch, step.num_kv_heads, step.capacity, step.group, cache, gpu.multiprocessors)
        heads = {"num_heads": step.num_heads, "head_dim": step.head_dim}
        shapes = gqa_workspace(batch=batch, steps=step.steps, splits=splits, dtype=step.dtype, **heads)
    else:
        shapes = moe_workspace(
            num_tokens=step.num_tokens,
            k=step.tensors["expert_ids"].shape[1],
            num_experts=step.num_experts,
            hidden_size=step.hidden_size,
            inner_size=step.inner_size,
            dtype=step.dtype,
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
    name, attributes = _plugin(enqueues[0].step)
    num_modules = host.executor.driver.double_count_modules()
    plugin = host.create_plugin(name, attributes)
    calls = [_prepare(enqueue) for enqueue in enqueues]
    try:
        sides = ([call.inputs for call in calls], [call.outputs for call in calls])
        arguments = [argument for side in sides for argument in (_ranges(side), len(side[0]))]
        size = host.harness.harness_configure(plugin, *arguments)
        assert size >= 0, host.take_log()
        plugin = {"runtime": host.restore, "build": host.attach}[phase](plugin)
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
        host.harness.harness_destroy(plugin)
    misuses = host.executor.take_misuses()
    assert not misuses, misuses
    left = host.executor.driver.double_count_modules() - num_modules
    assert left == 0, f"{left} modules stay loaded after the plugin that used them"
    return pickle.dumps(outcomes)


def _enqueue(
    host: _Host,
    plugin: ctypes.c_void_p,
    enqueue: Enqueue,
    call: _Call,
    contexts: Sequence[tuple[ctypes.c_void_p, ctypes.c_void_p]],
    gpus: Sequence[Gpu],
    workspace: Region,
) -> Outcome:
    context, stream = contexts[enqueue.gpu]
    executor, harness = host.executor, host.harness
    executor.driver.double_set_current(context)
    if enqueue.in_new_context:
        executor.driver.double_replace_context(context)
    regions = {name: Region.of(tensor) for name, tensor in call.named.items()}
    memory = Memory(regions, workspace, _buffer_bytes(enqueue.step, gpus[enqueue.gpu]))
    host.take_log()
    executor.begin(memory, stream, is_executed=enqueue.is_executed)
    if enqueue.fault is not None:
        executor.driver.double_fail(enqueue.fault.function.encode(), enqueue.fault.nth, LAUNCH_FAILED)
    described = (_descriptions(call.inputs), len(call.inputs), _descriptions(call.outputs), len(call.outputs))
    status = harness.harness_change_shape(plugin, *described)
    if status == 0:
        data = (_pointers(call.inputs), _pointers(call.outputs))
        status = harness.harness_enqueue(plugin, *described, *data, ctypes.c_void_p(workspace.address), stream)
    executor.driver.double_fail(b"", 0, 0)
    launches = executor.end()
    return Outcome(status, host.take_log(), executor.take_calls(), executor.take_misuses(), launches, call.named)
