"""The plugin library as TensorRT calls it, through driver/harness.cpp: plugins made of steps, and steps enqueued.

Whose memory it is, and which driver there is, is the caller's business: the double of the driver
(tests/plugins/enqueue.py), or a GPU (tests/plugins/device.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.plugins.any_step import Step
from tests.plugins.gqa_cases import CACHE, GqaStep
from tests.plugins.linear_cases import LinearStep

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


@dataclass
class Call:
    """Inputs and outputs of one `enqueue`, in the plugin's order; `named` has them as tests name them."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    named: dict[str, torch.Tensor]


def prepare(step: Step, device: torch.device, *, batch: int = 1, is_copied: bool = False) -> Call:
    """Copies of a step's tensors on a device, and poisoned outputs.

    Args:
        step: what to compute.
        device: where.
        batch: B of a MoeStep or LinearStep, whose tokens are [B, S].
        is_copied: present lies elsewhere than past.
    """
    named = {name: tensor.to(device, copy=True) for name, tensor in step.tensors.items() if tensor is not None}
    if isinstance(step, GqaStep):
        order = ("qkv", "key", "value", "cos", "sin", "position_ids", "cache_length", "new_tokens")
        cache = [name for name in CACHE if name in named]
        norms = ("q_norm", "k_norm") if step.has_norms else ()
        inputs = [named[name] for name in (*order, *cache[2:], *norms)]
        rows, steps, _ = named["qkv"].shape
        output = torch.empty(rows, steps, step.num_heads * step.head_dim, dtype=named["qkv"].dtype, device=device)
        if is_copied:
            named |= {f"present {name}": named[name].clone() for name in cache}
        present = [named[f"present {name}" if is_copied else name] for name in cache]
        named["output"] = _poisoned_like(output)
        return Call(inputs, [named["output"], *present], named)
    steps = step.num_tokens // batch
    assert step.num_tokens == batch * steps
    if isinstance(step, LinearStep):
        for part in ("codes", "scale", "zero"):
            if (tensor := getattr(step.weights, part)) is not None:
                named[part] = tensor.to(device)
        x = named["x"].view(batch, steps, step.columns)
        inputs = [x, *(named[name] for name in ("codes", "scale", "zero", "bias") if name in named)]
        named["output"] = _poisoned_like(torch.empty(step.num_tokens, step.rows, dtype=named["x"].dtype, device=device))
        return Call(inputs, [named["output"].view(batch, steps, step.rows)], named)
    tokens = [named[name] for name in ("hidden", "expert_ids", "expert_weights")]
    inputs = [tensor.view(batch, steps, tensor.shape[-1]) for tensor in tokens]
    for part in ("codes", "scale", "zero"):
        for name, weights in (("gate_up", step.gate_up), ("down", step.down)):
            tensor = getattr(weights, part)
            if tensor is not None:
                inputs.append(tensor.to(device))
                named[name if part == "codes" else f"{name}_{part}"] = inputs[-1]
    named["output"] = _poisoned_like(named["hidden"])
    return Call(inputs, [named["output"].view(batch, steps, step.hidden_size)], named)


class Harness:
    """The harness and the plugin library, loaded into this process."""

    def __init__(self, harness: Path, library: Path) -> None:
        """Loads both, `harness` as `tests.plugins.enqueue.compile_driver` made it."""
        self._api = ctypes.CDLL(str(harness))
        for name in ("harness_load", "harness_create", "harness_attach", "harness_restore"):
            getattr(self._api, name).restype = ctypes.c_void_p
        self._api.harness_configure.restype = ctypes.c_int64
        self._api.harness_take_log.restype = ctypes.c_char_p
        self._library = self._made(self._api.harness_load(str(library).encode()))

    def take_log(self) -> str:
        """What was logged since the last time."""
        return str(self._api.harness_take_log().decode())

    def create(self, step: Step) -> ctypes.c_void_p:
        """A plugin of the build phase that computes such steps."""
        name, attributes = _plugin(step)
        fields, kept = [], []
        for key, value in attributes.items():
            number, make = _FIELD_TYPES[type(value)]
            kept.append(make(value))
            fields.append(_Field(key.encode(), number, 1, ctypes.addressof(kept[-1])))
        return self._made(self._api.harness_create(self._library, name.encode(), _array(_Field, fields), len(fields)))

    def configure(self, plugin: ctypes.c_void_p, calls: Sequence[Call]) -> int:
        """Bytes of workspace for a profile that just holds these calls."""
        sides = ([call.inputs for call in calls], [call.outputs for call in calls])
        arguments = [argument for side in sides for argument in (_ranges(side), len(side[0]))]
        size = int(self._api.harness_configure(plugin, *arguments))
        assert size >= 0, self.take_log()
        return size

    def attach(self, plugin: ctypes.c_void_p) -> ctypes.c_void_p:
        """The plugin as the builder times it; the given one is no more."""
        return self._made(self._api.harness_attach(plugin))

    def restore(self, plugin: ctypes.c_void_p) -> ctypes.c_void_p:
        """The plugin, gone through a plan into an execution context; the given one is no more."""
        return self._made(self._api.harness_restore(plugin))

    def choose_tactic(self, plugin: ctypes.c_void_p, step: Step) -> None:
        """The step's, as TensorRT does: one of those that the plugin offers, or 0 where there is nothing to choose."""
        offered = (ctypes.c_int32 * 8)()
        count = int(self._api.harness_tactics(plugin, offered, len(offered)))
        assert count == 0 or step.tactic in offered[:count], self.take_log()
        assert self._api.harness_set_tactic(plugin, step.tactic if count else 0) == 0, self.take_log()

    def enqueue(self, plugin: ctypes.c_void_p, call: Call, workspace: int, stream: ctypes.c_void_p) -> int:
        """What `onShapeChange`, or after it `enqueue`, returned: 0 is success."""
        described = (_descriptions(call.inputs), len(call.inputs), _descriptions(call.outputs), len(call.outputs))
        status = int(self._api.harness_change_shape(plugin, *described))
        if status != 0:
            return status
        data = (_pointers(call.inputs), _pointers(call.outputs))
        return int(self._api.harness_enqueue(plugin, *described, *data, ctypes.c_void_p(workspace), stream))

    def destroy(self, plugin: ctypes.c_void_p) -> None:
        """Ends a plugin."""
        self._api.harness_destroy(plugin)

    def _made(self, handle: int | None) -> ctypes.c_void_p:
        assert handle, self.take_log()
        return ctypes.c_void_p(handle)


def _plugin(step: Step) -> tuple[str, dict[str, int | float]]:
    """A plugin's name and attributes."""
    if isinstance(step, GqaStep):
        heads = {"num_heads": step.num_heads, "num_kv_heads": step.num_kv_heads, "head_dim": step.head_dim}
        floats = {"norm_epsilon": float(step.norm_epsilon), "scale": float(step.scale)}
        return "QwenGQA", {**heads, "cache_bits": 8 if step.is_int8 else 16, **floats}
    if isinstance(step, LinearStep):
        weights = step.weights
        group_size = -1 if weights.group_size == step.columns else weights.group_size
        options = {"has_zeros": int(weights.zero is not None), "has_bias": int(step.has_bias)}
        return "QwenLinear", {"weight_bits": weights.bits, "group_size": group_size, **options}
    sizes = {"num_experts": step.num_experts, "experts_per_token": step.tensors["expert_ids"].shape[1]}
    return "QwenMoE", {**sizes, "weight_bits": step.gate_up.bits, "has_zeros": int(step.gate_up.zero is not None)}


def _poisoned_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor.contiguous().view(torch.uint8), POISON).view(tensor.dtype)


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
