"""The architectures that a Hugging Face folder may be of: one row, and one file with the reader of its config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_aot.exporter.checkpoint.base import TensorInfo
from qwen_aot.exporter.checkpoint.hf import fused_attention, fused_experts, qwen, qwen2
from qwen_aot.exporter.checkpoint.names import CANONICAL, TensorNames
from qwen_aot.exporter.model.config import ModelConfig

# (the checkpoint's path, a tensor's name, where it lies, the configuration) -> the tensors that it holds, by names.
Separator = Callable[[Path, str, TensorInfo, ModelConfig], Iterator[tuple[str, TensorInfo]]]
ConfigReader = Callable[[Mapping[str, Any], Mapping[str, Any]], ModelConfig]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What tells files of one `model_type` from those of others; the decoder is the same for all.

    Attributes:
        parse: config.json and generation_config.json, parsed -> the model's facts.
        names: of the tensors in its files, each role's apart.
        separate: gives those apart that its files hold in one tensor.
    """

    parse: ConfigReader
    names: TensorNames
    separate: Separator = fused_experts.separate


ARCHITECTURES: dict[str, Architecture] = {  # by `model_type`
    "qwen": Architecture(qwen.parse, qwen.NAMES, fused_attention.separate),
    "qwen2": Architecture(qwen2.parse, CANONICAL),
    "qwen2_moe": Architecture(qwen2.parse, CANONICAL),
}
