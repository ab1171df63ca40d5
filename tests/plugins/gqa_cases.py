"""Random steps of `QwenGQA`, poisoned: NaN (or a huge scale) wherever nothing may be read, and where results go."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from qwen_aot.plugins.kernels.gqa_reference import gqa_reference, quantize_int8
from qwen_aot.plugins.launch import Launch, gqa_launches, gqa_workspace, num_splits
from qwen_aot.plugins.variants import TACTICS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TORCH_DTYPES = {**DTYPES, "fp32": torch.float32, "i32": torch.int32, "i64": torch.int64}
CACHE = ("key", "value", "key_scale", "value_scale")
TIMED = "timed "  # before the name of a part of the workspace that takes an input's place
SM = os.environ.get("QWEN_AOT_TEST_SM", "8.9")  # whose tiles; its own on a GPU (tests/plugins/test_gpu.py)


def allocate(shapes: dict[str, tuple[tuple[int, ...], str]], device: torch.device) -> dict[str, torch.Tensor]:
    """A workspace full of NaN, or of -1 in integers."""
    return {
        name: torch.full(shape, -1 if dtype in ("i32", "i64") else math.nan, dtype=TORCH_DTYPES[dtype], device=device)
        for name, (shape, dtype) in shapes.items()
    }


def apart(workspace: Mapping[str, torch.Tensor], inputs: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """Parts of a workspace, with names of their own beside the inputs."""
    return {TIMED * (name in inputs) + name: tensor for name, tensor in workspace.items()}


@dataclass
class GqaStep:
    """One step; `lengths` are (tokens in the cache, new tokens) of each row.

    With `is_timed`, as the builder times it: present is a copy of past, and lengths may be any.
    """

    lengths: list[tuple[int, int]]
    steps: int
    dtype: str = "fp16"
    is_int8: bool = False
    has_norms: bool = False
    head_dim: int = 64
    num_kv_heads: int = 2
    group: int = 1
    capacity: int = 0
    sm_count: int = 4
    sm: str = SM
    tactic: int = TACTICS[0]
    is_timed: bool = False
    seed: int = 0
    tensors: dict[str, torch.Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        batch, dtype = len(self.lengths), DTYPES[self.dtype]
        self.num_heads = self.num_kv_heads * self.group
        self.capacity = self.capacity or max(past for past, _ in self.lengths) + self.steps + 3
        shape = (batch, self.num_kv_heads, self.capacity, self.head_dim)
        past = torch.tensor([past for past, _ in self.lengths])
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random)

        qkv = normal(batch, self.steps, width).to(dtype)
        key, value = normal(*shape), normal(*shape)
        for row, (_, new) in enumerate(self.lengths):
            qkv[row, self.steps if self.is_timed else new :] = math.nan  # padding
        is_unused = torch.arange(self.capacity) >= past.unsqueeze(1)  # [B, C]
        is_unused = is_unused.unsqueeze(1).expand(shape[:3])
        key_scale = value_scale = None
        if self.is_int8:
            key, key_scale = quantize_int8(key)
            value, value_scale = quantize_int8(value)
            key_scale[is_unused] = value_scale[is_unused] = math.nan
        else:
            key, value = key.to(dtype), value.to(dtype)
            key[is_unused] = value[is_unused] = math.nan
        angles = torch.arange(self.capacity).unsqueeze(1) / 100 ** torch.linspace(0, 1, self.head_dim // 2)
        self.tensors = {
            "qkv": qkv,
            "key": key,
            "value": value,
            "key_scale": key_scale,
            "value_scale": value_scale,
            "cos": angles.cos(),
            "sin": angles.sin(),
            "position_ids": past.unsqueeze(1) + torch.arange(self.steps),
            "cache_length": past,
            "new_tokens": torch.tensor([new for _, new in self.lengths]),
        }
        self.scale = self.head_dim**-0.5
        self.norm_epsilon = 0.0
        if self.has_norms:
            self.norm_epsilon = 0.05  # of the size of what it is added to, so that it can be seen
            self.tensors |= {name: 1 + 0.3 * normal(self.head_dim) for name in ("q_norm", "k_norm")}

    def expected(self) -> dict[str, torch.Tensor | None]:
        """The reference's `output`, and cache after the step."""
        tensors = {name: None if tensor is None else tensor.clone() for name, tensor in self.tensors.items()}
        if self.is_timed:  # lengths are not those given; past, which isn't present, stays as it is
            tensors["position_ids"] = torch.zeros_like(self.tensors["position_ids"])
            tensors["new_tokens"] = torch.full_like(self.tensors["new_tokens"], min(self.steps, self.capacity))
            tensors["cache_length"] = (self.capacity - tensors["new_tokens"]).clamp(max=1024)
        output = gqa_reference(
            **tensors,  # type: ignore[arg-type]
            num_heads=self.num_heads,
            scale=self.scale,
            norm_epsilon=self.norm_epsilon,
        )
        return {"output": output, **{name: (self.tensors if self.is_timed else tensors)[name] for name in CACHE}}

    def prepare(self, device: torch.device) -> tuple[dict[str, torch.Tensor | None], list[Launch]]:
        """Tensors on the device (workspace and output poisoned) by name, and the launches over them."""
        on_device = {name: None if tensor is None else tensor.to(device) for name, tensor in self.tensors.items()}
        cached = {name: on_device[name] for name in CACHE}
        present = cached
        if self.is_timed:
            present = {name: None if tensor is None else tensor.clone() for name, tensor in cached.items()}
            on_device |= {f"present {name}": tensor for name, tensor in present.items()}
        inputs = {name: on_device[name] for name in self.tensors} | present
        batch = len(self.lengths)
        cache = "int8" if self.is_int8 else "same"
        splits = num_splits(batch, self.num_kv_heads, self.capacity, self.group, cache, self.sm_count, self.tactic)
        shapes = gqa_workspace(
            batch=batch,
            steps=self.steps,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            splits=splits,
            dtype=self.dtype,
            is_timed=self.is_timed,
        )
        workspace = allocate(shapes, device)
        output_shape = (batch, self.steps, self.num_heads * self.head_dim)
        output = torch.full(output_shape, math.nan, dtype=DTYPES[self.dtype], device=device)
        launches = gqa_launches(
            self.sm,
            self.sm_count,
            **inputs,  # type: ignore[arg-type]
            output=output,
            workspace=workspace,
            num_heads=self.num_heads,
            scale=self.scale,
            norm_epsilon=self.norm_epsilon,
            tactic=self.tactic,
            is_timed=self.is_timed,
        )
        return {**on_device, **apart(workspace, on_device), "output": output}, launches

    def run(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """The kernels' `output`, and cache after the step."""
        tensors, launches = self.prepare(device)
        for launch in launches:
            launch.run()
        return {name: tensors[name] for name in ("output", *CACHE)}
