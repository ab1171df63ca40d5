"""Every published variant by its name: its facts without a checkpoint.

Source: the config.json of each model as published. A chat model has the shape of its base model.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.published.qwen import QWEN
from qwen_aot.exporter.model.published.qwen1_5 import QWEN1_5
from qwen_aot.exporter.model.published.qwen_vl import QWEN_VL, WITHOUT_OPEN_WEIGHTS

VARIANTS: Mapping[str, ModelConfig] = {**QWEN, **QWEN_VL, **QWEN1_5}


def canonical_name(name: str) -> str | None:
    """The variant's key in VARIANTS for any spelling (`Qwen/Qwen1.5-7B-Chat`, `qwen1.5-7b`, `Qwen-1_8B`), or None."""
    key = name.lower().replace("_", ".").removeprefix("qwen/").removesuffix("-chat")
    return key if key in VARIANTS else None


def refusal_of(name: str) -> str | None:
    """Why a model that is known by its name can't be built; None: it isn't such a one."""
    key = name.lower().removeprefix("qwen/").removesuffix("-latest")
    if key not in WITHOUT_OPEN_WEIGHTS:
        return None
    return f"{name} has no open weights: it is served by its makers alone; accepted of its kind: {', '.join(QWEN_VL)}"


def variant_config(name: str) -> ModelConfig:
    """The facts of a published variant.

    Raises:
        CheckpointError: there is no such variant; the message lists those there are.
    """
    key = canonical_name(name)
    if key is None and (refusal := refusal_of(name)) is not None:
        raise CheckpointError(refusal)
    if key is None:
        raise CheckpointError(f"{name!r} is not a Qwen1.5 variant; accepted: {', '.join(VARIANTS)} (also with -chat)")
    return VARIANTS[key]
