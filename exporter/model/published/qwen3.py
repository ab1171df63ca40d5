"""The published Qwen3 models, and those of July 2025 (model types `qwen3`, `qwen3_moe`).

Heads are of 128 elements whatever the hidden size is. 8 of 128 experts are chosen, and none is shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.published.generation import Generation, decoder, experts

_VOCABULARY = 151936


def _dense(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, *, tie_word_embeddings: bool = False
) -> ModelConfig:
    return decoder(
        hidden_size,
        intermediate_size,
        layers,
        heads,
        8,
        _VOCABULARY,
        model_type="qwen3",
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=tie_word_embeddings,
    )


def _sparse(hidden_size: int, intermediate_size: int, layers: int, heads: int, *, expert_size: int) -> ModelConfig:
    return decoder(
        hidden_size,
        intermediate_size,
        layers,
        heads,
        4,
        _VOCABULARY,
        model_type="qwen3_moe",
        head_dim=128,
        max_position_embeddings=40960,
        moe=experts(128, 8, expert_size, layers, normalised=True),
    )


# hidden, intermediate, layers, heads
_SIZES: Mapping[str, ModelConfig] = {
    "0.6b": _dense(1024, 3072, 28, 16, tie_word_embeddings=True),
    "1.7b": _dense(2048, 6144, 28, 16, tie_word_embeddings=True),
    "4b": _dense(2560, 9728, 36, 32, tie_word_embeddings=True),
    "8b": _dense(4096, 12288, 36, 32),
    "14b": _dense(5120, 17408, 40, 40),
    "32b": _dense(5120, 25600, 64, 64),
    "30b-a3b": _sparse(2048, 6144, 48, 32, expert_size=768),
    "235b-a22b": _sparse(4096, 12288, 94, 64, expert_size=1536),
}

QWEN3 = Generation(name="Qwen3", prefix="qwen3-", sizes=_SIZES, endings={"": {}})

QWEN3_2507 = Generation(
    name="Qwen3-2507",
    prefix="qwen3-",
    sizes={
        size: dataclasses.replace(_SIZES[size], max_position_embeddings=262144, rope_theta=5e6)
        for size in ("4b", "235b-a22b")
    },
    endings={"-instruct-2507": {}, "-thinking-2507": {}},
)
