"""A folder as a checkpoint: facts that only config.json and the tensors together tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny


@pytest.mark.parametrize("are_stored", [True, False])
@pytest.mark.parametrize("key", ["attention_bias", "qkv_bias"])
def test_denied_biases_of_a_dense_model_are_those_that_are_stored(key: str, are_stored: bool, tmp_path: Path) -> None:
    """The two keys are not read by transformers' Qwen2, which has biases whatever they say."""
    save_tiny(tmp_path, layers=1)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: False}))
    if not are_stored:
        state = load_file(tmp_path / "model.safetensors")
        kept = {name: array for name, array in state.items() if not name.endswith(".bias")}
        save_file(kept, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.attention_bias == are_stored


def test_denied_biases_of_experts_models_are_denied(tmp_path: Path) -> None:
    """What transformers' Qwen2Moe reads is qkv_bias, not attention_bias."""
    save_tiny(tmp_path, layers=1, moe={})
    raw = json.loads((tmp_path / "config.json").read_text())
    for change, has_biases in (({"qkv_bias": False}, False), ({"attention_bias": False}, True)):
        (tmp_path / "config.json").write_text(json.dumps(raw | change))
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.config.attention_bias == has_biases
