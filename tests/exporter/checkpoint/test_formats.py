"""Every checkpoint format, from its bytes to the logits of the standard lowering, against transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import reference_logits, save_tiny, tiny_config, tiny_model
from tests.exporter.lowering.lowerings import export
from tests.exporter.stepper import Stepper
from tests.gguf_files import save_gguf
from tests.quantized_files import (
    awq,
    awq_config,
    compressed_tensors,
    compressed_tensors_config,
    gptq,
    gptq_config,
    random_codes,
    save_quantized,
)

BOUND = 1e-3  # fp32 products summed in another order
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
MOE = {"moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}, "layers": 1}

FOLDERS: dict[str, dict[str, Any]] = {
    "sharded": {"layers": 2, "shard_size": 20_000},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "tied": True},
    "bfloat16_moe_sharded": {"dtype": "bfloat16", "shard_size": 20_000, **MOE},
    "no_qkv_bias": {"moe": {"qkv_bias": False}},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    },
}


def check(checkpoint: Path, model: Any, folder: Path) -> None:
    """Prefill and decode through the standard lowering give the model's logits."""
    stepper = Stepper(export(checkpoint, folder, "standard"), rows=1, capacity=16)
    got = [stepper.step([IDS[:7]])[0]] + [stepper.step([[token]])[0] for token in IDS[7:]]
    want = reference_logits(model, [IDS])[0, 6:].numpy()
    np.testing.assert_allclose(np.stack(got), want, atol=BOUND, rtol=0)


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_saved_by_transformers(case: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "checkpoint", **({"kv_heads": 2, "layers": 1} | FOLDERS[case]))
    if "shard_size" in FOLDERS[case]:
        assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    check(tmp_path / "checkpoint", model, tmp_path / "onnx")


@pytest.mark.parametrize(("architecture", "kind"), [("qwen2", "F16"), ("qwen2moe", "Q8_0"), ("llama", "Q4_1")])
def test_a_gguf_file(architecture: str, kind: str, tmp_path: Path) -> None:
    """The reference computes with the file's own (dequantized) weights."""
    config = tiny_config(kv_heads=2, **(MOE if architecture == "qwen2moe" else {"layers": 2, "tied": True}))
    model = tiny_model(config)
    path = tmp_path / "model.gguf"
    written = save_gguf(path, model, architecture, kind=gguf.GGMLQuantizationType[kind])
    load(model, written)
    check(path, model, tmp_path / "onnx")


QUANTIZED: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "gptq with different orders of q, k and v": (
        gptq_config(sym=False, desc_act=True),
        gptq,
        partial(random_codes, symmetric=False, shuffled=True),
        {},
    ),
    "gptq of 8 bits with experts": (
        gptq_config(bits=8, group_size=16),
        gptq,
        partial(random_codes, bits=8, group_size=16),
        MOE,
    ),
    "awq": (awq_config(), awq, partial(random_codes, symmetric=False, smallest_zero=0), {}),
    "compressed-tensors": (compressed_tensors_config(), compressed_tensors, random_codes, {}),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_quantized_folder(case: str, tmp_path: Path) -> None:
    """The reference computes with the weights that were packed, in fp32."""
    quantization, pack, make, config = QUANTIZED[case]
    config = {"layers": 1, "kv_heads": 2} | config
    saved = save_quantized(tmp_path / "checkpoint", quantization, pack, make=make, zero_biases="gptq" in case, **config)
    model = tiny_model(tiny_config(**config))
    plain = {name: array.astype(np.float32) for name, array in saved.plain.items() if name in tensor_names(model)}
    load(model, plain | {name: weight.values for name, weight in saved.weights.items()})
    check(tmp_path / "checkpoint", model, tmp_path / "onnx")


def tensor_names(model: torch.nn.Module) -> set[str]:
    """Of those that aren't experts' matrices."""
    return {name for name, _ in model.named_parameters()}


def load(model: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    """Gives the model these weights (Hugging Face names, experts apart); what is not among them becomes zero."""
    left = dict(weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            prefix, experts, part = name.rpartition("experts.")
            if experts:
                parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
                stacked = [
                    np.concatenate([left.pop(f"{prefix}experts.{e}.{each}.weight") for each in parts])
                    for e in range(parameter.shape[0])
                ]
                parameter.copy_(torch.from_numpy(np.stack(stacked)))
            elif name in left:
                parameter.copy_(torch.from_numpy(np.array(left.pop(name))))
            else:
                assert name.endswith(".bias"), name  # a llama file has none
                parameter.zero_()
    assert not left
