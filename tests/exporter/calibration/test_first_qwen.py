"""Layers that are computed for calibration: first-generation Qwen's log-n scaling and dynamic NTK are in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_aot.exporter.calibration.decoder_layer import DecoderLayer, load_weights
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.first_qwen import CONFIG, LAYERS, SEQ_LENGTH, VOCAB, Statement, make_weights, save_folder


@pytest.mark.parametrize("length", [20, SEQ_LENGTH, SEQ_LENGTH + 1, 100])
@pytest.mark.parametrize("changed", [{}, {"use_logn_attn": False}, {"use_dynamic_ntk": False}])
def test_layers_are_the_statements(length: int, changed: dict[str, Any], tmp_path: Path) -> None:
    """The whole of a window is its first step."""
    config, weights = {**CONFIG, **changed}, make_weights()
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, length))
    with open_checkpoint(save_folder(tmp_path, weights, config=config)) as checkpoint:
        hidden = torch.from_numpy(weights["transformer.wte.weight"][ids])
        layer = DecoderLayer(checkpoint.config, length)
        for index in range(LAYERS):
            hidden = layer(load_weights(checkpoint, index), hidden)
    x = hidden.numpy().astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"]) * weights["transformer.ln_f.weight"]
    for row in range(2):
        wanted = Statement(weights, config).logits(ids[row].tolist())
        np.testing.assert_allclose(x[row] @ weights["lm_head.weight"].T, wanted, atol=1e-3)
