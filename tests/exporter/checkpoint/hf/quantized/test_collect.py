from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny
from tests.quantized_files import gptq, gptq_config, save_quantized


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_a_configuration_without_quantized_tensors(file: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    content = config | {"quantization_config": gptq_config()} if file == "config.json" else gptq_config()
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=rf"{file}.*: the weights are quantized by gptq, and no tensor is; accepted"
    ):
        open_checkpoint(tmp_path)


def test_a_module_that_the_model_lacks(tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq)
    saved.change(
        **{
            f"model.layers.7.mlp.up_proj.{name}": array
            for name, array in gptq(saved.weights["model.layers.0.mlp.up_proj.weight"]).items()
        }
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.mlp\.up_proj is quantized .*, and no linear of this"):
        open_checkpoint(tmp_path)


def test_a_part_of_no_module(tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq)
    saved.change(qweight=gptq(saved.weights["model.layers.0.mlp.up_proj.weight"])["qweight"])
    with pytest.raises(CheckpointError, match=r" is quantized \(qweight\), and no linear of this model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers_that_are_no_part(dtype: type, tmp_path: Path) -> None:
    saved = save_quantized(tmp_path, gptq_config(), gptq)
    saved.change(**{"model.norm.weight": np.ones(64, dtype)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype int(32|64); accepted: floating point"):
        open_checkpoint(tmp_path)
