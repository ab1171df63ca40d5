"""The architectures that a Hugging Face folder may be of: one row, and one file with the reader of its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_aot.exporter.checkpoint.hf import qwen2
from qwen_aot.exporter.checkpoint.names import CANONICAL, TensorNames
from qwen_aot.exporter.model.config import ModelConfig

ConfigReader = Callable[[Mapping[str, Any], Mapping[str, Any]], ModelConfig]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What tells files of one `model_type` from those of others; the decoder is the same for all.

    Attributes:
        parse: config.json and generation_config.json, parsed -> the model's facts.
        names: of the tensors in its files.
    """

    parse: ConfigReader
    names: TensorNames


ARCHITECTURES: dict[str, Architecture] = {  # by `model_type`
    "qwen2": Architecture(qwen2.parse, CANONICAL),
    "qwen2_moe": Architecture(qwen2.parse, CANONICAL),
    "qwen3": Architecture(qwen2.parse, CANONICAL),
    "qwen3_moe": Architecture(qwen2.parse, CANONICAL),
}
