"""Scales of an int8 cache: transformers' keys and values on the same tokens, at any position, are not saturated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_aot.errors import ExportError
from qwen_aot.exporter.calibration.cache_scales import CacheScales, calibrate_cache
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import quiet, save_tiny

TOKENS = np.random.default_rng(3).integers(0, 131, (5, 24))
# Float32 sums in another order; seen: 5e-7.
BOUND = 1e-5

CASES: dict[str, dict[str, Any]] = {
    "grouped": {"heads": 4, "kv_heads": 2, "layers": 3},
    "experts": {"moe": {}, "layers": 2},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "rope_theta": 10000.0,
        }
    },
}


def cached(model: Any, shift: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values [B, T, Hkv, D] of each layer, as transformers caches them, tokens from position `shift` on."""
    positions = torch.arange(shift, shift + TOKENS.shape[1])[None].expand(len(TOKENS), -1)
    with torch.no_grad():
        cache = model(torch.from_numpy(TOKENS), position_ids=positions, use_cache=True).past_key_values
    return [(layer.keys.transpose(1, 2).numpy(), layer.values.transpose(1, 2).numpy()) for layer in cache.layers]


def calibrated(path: Path, tmp_path: Path) -> CacheScales:
    folder = tmp_path / "states"
    folder.mkdir(exist_ok=True)
    done: list[tuple[int, int]] = []
    with open_checkpoint(path) as checkpoint:
        scales = calibrate_cache(checkpoint, TOKENS, folder, lambda *step: done.append(step))
        layers = checkpoint.config.num_hidden_layers
    assert done == [(layer, layers) for layer in range(layers + 1)]
    return scales


@pytest.mark.parametrize("case", CASES)
def test_the_largest_value_and_the_longest_pair_of_a_key_are_code_127(case: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny", **CASES[case])
    scales = calibrated(tmp_path / "tiny", tmp_path)
    assert scales.keys.dtype == scales.values.dtype == np.float32
    for layer, (keys, values) in enumerate(cached(model)):
        half = keys.shape[-1] // 2
        pairs = np.sqrt(keys[..., :half].astype(np.float64) ** 2 + keys[..., half:].astype(np.float64) ** 2)
        longest = pairs.max((0, 1))
        expected = np.concatenate((longest, longest), axis=1).reshape(-1) / 127
        np.testing.assert_allclose(scales.keys[layer], expected, rtol=BOUND)
        np.testing.assert_allclose(scales.values[layer], np.abs(values).max((0, 1)).reshape(-1) / 127, rtol=BOUND)


@pytest.mark.parametrize("shift", [1, 77, 480])
def test_at_another_position_nothing_is_saturated(shift: int, tmp_path: Path) -> None:
    """By the largest of each channel as it was seen, keys further on would be: the control."""
    model = save_tiny(tmp_path / "tiny", heads=4, kv_heads=2)
    scales = calibrated(tmp_path / "tiny", tmp_path)
    for layer, (keys, values) in enumerate(cached(model, shift)):
        largest = np.abs(keys).max((0, 1)).reshape(-1)
        assert (largest <= 127 * scales.keys[layer] * (1 + BOUND)).all()
        assert (np.abs(values).max((0, 1)).reshape(-1) <= 127 * scales.values[layer] * (1 + BOUND)).all()
        seen = np.abs(cached(model)[layer][0]).max((0, 1)).reshape(-1)
        assert (largest > 1.01 * seen).any()


def changed(path: Path, edit: Any) -> Path:
    model = save_tiny(path, heads=4, kv_heads=2)
    with torch.no_grad(), quiet():
        edit(model.model.layers[1].self_attn)
        model.save_pretrained(path)
    return path


def test_a_channel_that_was_never_seen_gets_its_layers_largest_scale(tmp_path: Path) -> None:
    def edit(attention: Any) -> None:
        for tensor in (attention.v_proj.weight, attention.v_proj.bias):
            tensor[3] = 0

    scales = calibrated(changed(tmp_path / "tiny", edit), tmp_path)
    assert scales.values[1, 3] == scales.values[1].max()
    assert len(set(scales.values[1].tolist())) == scales.values.shape[1] - 1


def test_a_layer_of_nothing_but_zeros_has_scales(tmp_path: Path) -> None:
    def edit(attention: Any) -> None:
        for projection in (attention.k_proj, attention.v_proj):
            projection.weight.zero_()
            projection.bias.zero_()

    scales = calibrated(changed(tmp_path / "tiny", edit), tmp_path)
    for found in (scales.keys[1], scales.values[1]):
        np.testing.assert_array_equal(found, np.float32(1) / np.float32(127))


def test_keys_beyond_float32_are_refused(tmp_path: Path) -> None:
    def edit(attention: Any) -> None:
        attention.k_proj.weight.fill_(3e38)

    with pytest.raises(ExportError, match=r"layer 1: a key isn't finite .*accepted .*--kv-precision auto"):
        calibrated(changed(tmp_path / "tiny", edit), tmp_path)
