"""Random steps of `QwenGQA`, poisoned: NaN (or a huge scale) wherever nothing may be read, and where results go."""

import math
import os
from dataclasses import dataclass, field

import torch

from qwen_aot.plugins.kernels.gqa_reference import gqa_reference, quantize_int8
from qwen_aot.plugins.launch import Launch, gqa_launches, gqa_workspace, num_splits

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TORCH_DTYPES = {**DTYPES, "fp32": torch.float32, "i32": torch.int32}
SM = os.environ.get("QWEN_AOT_TEST_SM", "8.9")  # whose tiles; its own on a GPU (tests/plugins/test_gpu.py)


def allocate(shapes: dict[str, tuple[tuple[int, ...], str]], device: torch.device) -> dict[str, torch.Tensor]:
    """A workspace full of NaN, or of -1 in integers."""
    return {
        name: torch.full(shape, -1 if dtype == "i32" else math.nan, dtype=TORCH_DTYPES[dtype], device=device)
        for name, (shape, dtype) in shapes.items()
    }


@dataclass
class GqaStep:
    """One step; `lengths` are (tokens in the cache, new tokens) of each row."""

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
            qkv[row, new:] = math.nan  # padding
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
        output = gqa_reference(
            **tensors,  # type: ignore[arg-type]
            num_heads=self.num_heads,
            scale=self.scale,
            norm_epsilon=self.norm_epsilon,
        )
        return {"output": output, **{name: tensors[name] for name in ("key", "value", "key_scale", "value_scale")}}

    def prepare(self, device: torch.device) -> tuple[dict[str, torch.Tensor | None], list[Launch]]:
        """Tensors on the device (workspace and output poisoned) by name, and the launches over them."""
        on_device = {name: None if tensor is None else tensor.to(device) for name, tensor in self.tensors.items()}
        batch = len(self.lengths)
        cache = "int8" if self.is_int8 else "same"
        splits = num_splits(batch, self.num_kv_heads, self.capacity, self.group, cache, self.sm_count)
        shapes = gqa_workspace(
            batch=batch,
            steps=self.steps,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            splits=splits,
            dtype=self.dtype,
        )
        workspace = allocate(shapes, device)
        output_shape = (batch, self.steps, self.num_heads * self.head_dim)
        output = torch.full(output_shape, math.nan, dtype=DTYPES[self.dtype], device=device)
        launches = gqa_launches(
            self.sm,
            self.sm_count,
            **on_device,  # type: ignore[arg-type]
            output=output,
            workspace=workspace,
            num_heads=self.num_heads,
            scale=self.scale,
            norm_epsilon=self.norm_epsilon,
        )
        return {**on_device, **workspace, "output": output}, launches

    def run(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """The kernels' `output`, and cache after the step."""
        tensors, launches = self.prepare(device)
        for launch in launches:
            launch.run()
        return {name: tensors[name] for name in ("output", "key", "value", "key_scale", "value_scale")}
