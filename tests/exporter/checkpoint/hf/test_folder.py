"""A folder as a checkpoint: facts that only config.json and the tensors together tell."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from qwen_aot.engines.bundle.text_facts import text_facts
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import tensor_shapes
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


def test_a_tied_model_saved_by_its_heads_name_only(tmp_path: Path) -> None:
    """As safetensors' `save_model` leaves one: it keeps the first name of tensors that share memory."""
    model = save_tiny(tmp_path, layers=1, tied=True)
    state = load_file(tmp_path / "model.safetensors")
    embedding = state.pop("model.embed_tokens.weight")
    save_file(state | {"lm_head.weight": embedding}, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(7)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == tensor_shapes(checkpoint.config)
        np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight"), embedding)


def test_a_head_alone_is_no_embedding_of_a_model_that_is_not_tied(tmp_path: Path) -> None:
    save_tiny(tmp_path, layers=1)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.embed_tokens.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert "model.embed_tokens.weight" not in checkpoint.tensors


def test_ids_of_a_larger_vocabulary_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A vocabulary that was cut, whose configurations still name the whole one's ids: transformers opens it too."""
    save_tiny(tmp_path, layers=1, vocab=131)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"bos_token_id": 151643, "eos_token_id": 130}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [131, 7]}))
    with caplog.at_level(logging.WARNING), open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.bos_token_id is None
        assert text_facts(checkpoint).eos_token_ids == (7, 130)
    assert "bos_token_id is 151643, beyond the vocabulary of 131: left out" in caplog.text
    assert "names 131 as an end of text, beyond the vocabulary of 131: left out" in caplog.text
