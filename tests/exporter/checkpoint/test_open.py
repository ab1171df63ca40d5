from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import tensor_shapes
from tests.checkpoints import save_tiny


def test_a_folder_saved_by_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_tiny(folder, with_tokenizer=True)
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.path == folder
        assert checkpoint.config.vocab_size == 320
        assert checkpoint.source["format"] == "safetensors"
        assert checkpoint.source["path"] == "model"
        assert len(checkpoint.source["sha256"]) == 64
        assert set(checkpoint.tokenizer.files) == {
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        }
        np.testing.assert_array_equal(
            checkpoint.read("model.embed_tokens.weight", slice(5, 9)),
            model.model.embed_tokens.weight[5:9].detach().numpy(),
        )
        with pytest.raises(CheckpointError, match="model has no tensor 'x'"):
            checkpoint.read("x")


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tied": True},
        {"kv_heads": 2, "head_dim": 32},
        {"moe": {}},
        {"moe": {"mlp_only_layers": [0]}},
        {"moe": {"qkv_bias": False}},
    ],
    ids=["mha", "tied", "gqa", "moe", "moe-mixed", "moe-no-bias"],
)
def test_what_transformers_saves_is_exactly_what_the_configuration_expects(
    shape: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(tmp_path, **shape)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {n: info.shape for n, info in checkpoint.tensors.items()} == tensor_shapes(checkpoint.config)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone does not exist; accepted: a folder saved by transformers"):
        open_checkpoint(tmp_path / "gone")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json and \.safetensors files; found: nothing"):
        open_checkpoint(tmp_path)


def test_a_folder_of_something_else_lists_what_was_found(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"file{number:02}.txt").touch()
    with pytest.raises(CheckpointError, match=r"found: file00\.txt, .*, file07\.txt and 4 more"):
        open_checkpoint(tmp_path)


def test_weights_without_config(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no config\.json; found: generation_config\.json, model\.safetensors"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_are_refused_with_the_conversion_command(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"holds {name}, a pickle") as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    words = shlex.split(message[message.index("python -c") : message.index(" (then copy")])
    assert f"save_pretrained({str(tmp_path) + '-safetensors'!r})" in words[2]
    compile(words[2], "command", "exec")


def test_safetensors_beside_pickles_are_used(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.source["format"] == "safetensors"


def test_a_folder_of_gguf_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds GGUF files; give one of them: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_the_folder(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name} is one file of a checkpoint; give its folder: "):
        open_checkpoint(tmp_path / name)


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(CheckpointError, match=r"model\.onnx is not a checkpoint; accepted: a folder"):
        open_checkpoint(tmp_path / "model.onnx")


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes"])
def test_other_quantized_checkpoints_are_refused_by_name(method: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(
        CheckpointError,
        match=rf"config\.json: quantization_config: quant_method is \"{method}\"; .*accepted: gptq, awq",
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("here", [".", "../model", "../model/../model", "sub/.."])
def test_the_working_folder_has_its_name(here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "model" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    with open_checkpoint(here) as checkpoint:
        assert checkpoint.path.name == "model"
