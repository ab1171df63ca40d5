from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.quantized_files import method_of
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny

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
        CheckpointError, match=rf"tensor '{LAYER}{suffix}' is one that {method} writes; .*accepted: the"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_file_of_a_quantizing_tool(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, layers=1)
    open_checkpoint(tmp_path).close()
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"holds {name}: its weights are quantized by .*move {name} away"):
        open_checkpoint(tmp_path)


def test_plain_names_are_plain() -> None:
    assert method_of(["model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"]) is None
