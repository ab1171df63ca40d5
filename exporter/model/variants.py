"""Every published variant by its name: its facts without a checkpoint.

Source: the config.json of each model as published. Models of one size share a shape; where the ending of a name says
another context (`-instruct`), the generation's row does.
"""

from __future__ import annotations

from collections.abc import Mapping

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.published.generation import Generation
from qwen_aot.exporter.model.published.qwen import QWEN
from qwen_aot.exporter.model.published.qwen1_5 import QWEN1_5
from qwen_aot.exporter.model.published.qwen2 import QWEN2
from qwen_aot.exporter.model.published.qwen2_5 import QWEN2_5, QWQ
from qwen_aot.exporter.model.published.qwen3 import QWEN3, QWEN3_2507
from qwen_aot.exporter.model.published.qwen_vl import QWEN_VL, WITHOUT_OPEN_WEIGHTS

GENERATIONS: tuple[Generation, ...] = (QWEN, QWEN_VL, QWEN1_5, QWEN2, QWEN2_5, QWQ, QWEN3, QWEN3_2507)

# One name of each shape and context; those that differ in nothing (`qwen1.5-7b-chat`) are found by it.
VARIANTS: Mapping[str, ModelConfig] = {name: config for each in GENERATIONS for name, config in each.models.items()}

_NAMED: Mapping[str, tuple[str, ModelConfig]] = {
    name: (known, config) for each in GENERATIONS for name, known, config in each.named()
}


def canonical_name(name: str) -> str | None:
    """The one name of a variant's facts for any spelling (`Qwen/Qwen1.5-7B-Chat`, `Qwen-1_8B`), or None."""
    found = _find(name)
    return None if found is None else found[0]


def refusal_of(name: str) -> str | None:
    """Why a model that is known by its name can't be built; None: it isn't such a one."""
    key = name.lower().removeprefix("qwen/").removesuffix("-latest")
    if key not in WITHOUT_OPEN_WEIGHTS:
        return None
    accepted = ", ".join(QWEN_VL.models)
    return f"{name} has no open weights: it is served by its makers alone; accepted of its kind: {accepted}"


def variant_config(name: str) -> ModelConfig:
    """The facts of a published variant.

    Raises:
        CheckpointError: there is no such variant; the message lists those there are.
    """
    found = _find(name)
    if found is None and (refusal := refusal_of(name)) is not None:
        raise CheckpointError(refusal)
    if found is None:
        raise CheckpointError(f"{name!r} is not a published variant; accepted: {variants_in_words()}")
    return found[1]


def variants_in_words() -> str:
    """All names, generation by generation, for messages."""
    return "; ".join(generation.words for generation in GENERATIONS)


def find_generation(name: str) -> Generation | None:
    """The generation of this name in any spelling (`Qwen2.5`), or None."""
    return next((each for each in GENERATIONS if each.name.lower() == name.lower()), None)


def _find(name: str) -> tuple[str, ModelConfig] | None:
    return _NAMED.get(name.lower().replace("_", ".").removeprefix("qwen/"))
