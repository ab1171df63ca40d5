"""Linears packed by the public libraries, against what the same libraries make of them, bit for bit in fp16."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.encoding import dequantize
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny

CASES: Mapping[str, Any] = json.loads(
    (Path(__file__).parents[4] / "golden" / "quantized.json").read_text(encoding="utf-8")
)["cases"]
DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32, "I64": np.int64}
MODULE = "model.layers.0.mlp.down_proj"
READABLE = [name for name, case in CASES.items() if case["values"] is not None]


def save(case: Mapping[str, Any], folder: Path) -> Path:
    """A tiny model whose down projection is the case's."""
    n, k = case["shape"]
    save_tiny(folder, dtype="float16", layers=1, hidden=n, heads=2, kv_heads=1, intermediate=k)
    state = load_file(folder / "model.safetensors")
    del state[f"{MODULE}.weight"]
    for name, tensor in case["tensors"].items():
        content = base64.b64decode(tensor["data"])
        state[f"{MODULE}.{name}"] = np.frombuffer(content, DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    save_file(state, folder / "model.safetensors")
    path = folder / "config.json"
    quantization = {"quantization_config": case["quantization_config"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantization), encoding="utf-8")
    return folder


def values_of(case: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(case["values"]), np.float16).reshape(case["shape"])


@pytest.mark.parametrize("name", READABLE)
def test_the_weight_is_the_librarys_to_the_last_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    values = values_of(case)
    with open_checkpoint(save(case, tmp_path)) as checkpoint:
        read = checkpoint.read(f"{MODULE}.weight")
        assert read.astype(np.float16).tobytes() == values.tobytes()
        encoded = checkpoint.read_encoded(f"{MODULE}.weight", slice(3, 14))
        assert dequantize(encoded).astype(np.float16).tobytes() == values[3:14].tobytes()


@pytest.mark.parametrize("name", READABLE)
def test_one_bit_of_a_code_is_heard(name: str, tmp_path: Path) -> None:
    case = json.loads(json.dumps(CASES[name]))
    codes = next(case["tensors"][key] for key in ("qweight", "weight_packed") if key in case["tensors"])
    content = bytearray(base64.b64decode(codes["data"]))
    content[5] ^= 0x10
    codes["data"] = base64.b64encode(content).decode()
    with open_checkpoint(save(case, tmp_path)) as checkpoint:
        differs = checkpoint.read(f"{MODULE}.weight").astype(np.float16) != values_of(case)
    assert differs.sum() == 1


def test_zeros_that_their_packer_spoiled_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"tensor {MODULE}\.qzeros has a zero point of 0 as gptq \(v1\) at group"
    ):
        open_checkpoint(save(CASES["autogptq 4 bits, zeros of 0"], tmp_path))


@pytest.mark.parametrize("bits", ["4 bits asymmetric, act-order", "8 bits asymmetric"])
def test_borrowed_zeros_are_read_only_where_the_tool_is_named(bits: str, tmp_path: Path) -> None:
    case = CASES[f"gptqmodel v1 {bits}"]
    config = {key: value for key, value in case["quantization_config"].items() if key != "meta"}
    with pytest.raises(CheckpointError, match=r"has a zero point of 0 as gptq \(v1\)"):
        open_checkpoint(save({**case, "quantization_config": config}, tmp_path))
