"""Experts of a layer stacked in one tensor, as transformers 5 holds them, read as the separate ones; nothing is copied.

Source: transformers' Qwen2MoeExperts: `experts.gate_up_proj` [E, 2F, M] (gate first) and `experts.down_proj` [E, M, F];
`save_pretrained` writes them apart unless it is told otherwise, a saved `state_dict` has them so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import FileSpan, TensorInfo
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role

_FUSED = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<part>gate_up_proj|down_proj)")


def separate(path: Path, name: str, info: TensorInfo, config: ModelConfig) -> Iterator[tuple[str, TensorInfo]]:
    """One tensor under its name; one that holds several experts as each expert's, under the names they have apart.

    Args:
        path: of the checkpoint, for messages.
        name: without what a framework put around it.
        info: where it lies.
        config: tells how many experts there are, of what size.

    Raises:
        CheckpointError: it holds experts and has another shape than the configuration says.
    """
    match = _FUSED.fullmatch(name)
    if match is None or config.moe is None:
        yield name, info
        return
    moe, hidden = config.moe, config.hidden_size
    if match["part"] == "gate_up_proj":
        parts: tuple[Role, ...] = (Role.EXPERT_GATE, Role.EXPERT_UP)
        expected = (moe.num_experts, 2 * moe.moe_intermediate_size, hidden)
    else:
        parts = (Role.EXPERT_DOWN,)
        expected = (moe.num_experts, hidden, moe.moe_intermediate_size)
    if info.shape != expected or info.span is None:
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(info.shape)}; accepted: {list(expected)} "
            "([experts, 2 x size, hidden] and [experts, hidden, size], as transformers 5 stacks them)"
        )
    shape = (expected[1] // len(parts), expected[2])
    length = math.prod(shape) * info.dtype.itemsize
    for index in range(moe.num_experts * len(parts)):
        expert, part = divmod(index, len(parts))
        weight = parts[part].template.rpartition("{expert}")[2]  # .gate_proj.weight
        span = FileSpan(info.span.path, info.span.offset + index * length, length)
        yield f"{match['experts']}.{expert}{weight}", replace(info, shape=shape, span=span)
