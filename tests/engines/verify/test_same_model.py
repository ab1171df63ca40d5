"""Which checkpoints a bundle may be compared with."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_aot.engines.verify.same_model import require_same_model
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import num_parameters
from qwen_aot.exporter.model.variants import VARIANTS

CONFIG = VARIANTS["qwen1.5-0.5b"]


def require(built: ModelConfig, given: ModelConfig, **facts: Any) -> None:
    model = {name: getattr(built, name) for name in ("vocab_size", "num_hidden_layers")}
    model |= {"name": "built", "num_parameters": num_parameters(built), **facts}
    manifest: Any = SimpleNamespace(model=SimpleNamespace(**model))
    checkpoint: Any = SimpleNamespace(path="given", config=given)
    require_same_model(manifest, checkpoint)


@pytest.mark.parametrize("has_biases", [True, False])
def test_the_same_model_is_accepted(has_biases: bool) -> None:
    config = dataclasses.replace(CONFIG, attention_bias=has_biases)
    require(config, config)


def test_zeros_in_the_place_of_biases_that_a_model_lacks_dont_count() -> None:
    plain = dataclasses.replace(CONFIG, attention_bias=False)
    require(CONFIG, plain)
    with pytest.raises(CheckpointError, match="the reference given has num_parameters"):
        require(plain, CONFIG)


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "num_parameters"])
def test_another_model_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"the reference given has {name} "):
        require(CONFIG, CONFIG, **{name: 7})
