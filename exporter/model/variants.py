"""Every published variant by its name: its facts without a checkpoint.

Source: the config.json of each model as published. A chat model has the shape of its base model.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.published.qwen import QWEN
from qwen_aot.exporter.model.published.qwen1_5 import QWEN1_5

VARIANTS: Mapping[str, ModelConfig] = {**QWEN, **QWEN1_5}


def canonical_name(name: str) -> str | None:
    """The variant's key in VARIANTS for any spelling (`Qwen/Qwen1.5-7B-Chat`, `qwen1.5-7b`, `Qwen-1_8B`), or None."""
    key = name.lower().replace("_", ".").removeprefix("qwen/").removesuffix("-chat")
    return key if key in VARIANTS else None


def variant_config(name: str) -> ModelConfig:
    """The facts of a published variant.

    Raises:
        CheckpointError: there is no such variant; the message lists those there are.
    """
    key = canonical_name(name)
    if key is None:
        raise CheckpointError(f"{name!r} is not a Qwen1.5 variant; accepted: {', '.join(VARIANTS)} (also with -chat)")
    return VARIANTS[key]
