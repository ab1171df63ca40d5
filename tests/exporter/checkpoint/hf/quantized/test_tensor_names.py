from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.quantized.tensor_names import method_of
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny
from tests.quantized_files import awq, awq_config, gptq, gptq_config, save_quantized

LAYER = "model.layers.0.mlp.up_proj."


@pytest.mark.parametrize(
    ("suffix", "method"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("g_idx", "GPTQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", r"fp8 \(block-wise\)"),
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("W_q", "HQQ"),
    ],
)
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_quantized_tensor_tells_its_method(suffix: str, method: str, dtype: type, tmp_path: Path) -> None:
    save_tiny(tmp_path, layers=1)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {LAYER + suffix: np.zeros(4, dtype)}, path)
    with pytest.raises(
        CheckpointError,
        match=rf"tensor '{LAYER}{suffix}' is one that {method} writes, and the configuration doesn't say so; accepted",
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["weight_scale", "W_q", "weight_packed"])
def test_a_tensor_of_another_method_than_the_configurations(suffix: str, tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq)
    saved.change(**{LAYER + suffix: np.zeros(4, np.float32)})
    with pytest.raises(
        CheckpointError, match=rf"tensor '{LAYER}{suffix}' is one that .* writes, and the configuration"
    ):
        open_checkpoint(tmp_path)


def test_awq_has_no_group_index(tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, awq_config(), awq)
    saved.change(**{LAYER + "g_idx": np.zeros(64, np.int32)})
    with pytest.raises(CheckpointError, match=rf"tensor '{LAYER}g_idx' is one that GPTQ writes"):
        open_checkpoint(tmp_path)


def test_plain_names_are_plain() -> None:
    assert method_of(["model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"]) is None
