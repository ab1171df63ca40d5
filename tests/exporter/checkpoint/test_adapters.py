from __future__ import annotations

import json
import logging
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny


def write_adapter(folder: Path, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    save_file({"base_model.model.x.lora_A.weight": np.zeros((1, 1), np.float32)}, folder / "adapter_model.safetensors")


def test_an_adapter_alone_is_named_with_the_command_that_merges_it(tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    write_adapter(folder, base_model_name_or_path="Qwen/Qwen1.5-0.5B")
    with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_config\.json\)") as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "merge it (of Qwen/Qwen1.5-0.5B) into the weights with peft" in message
    words = shlex.split(message[message.index("python -c") : message.index(" (then copy")])
    assert words[:2] == ["python", "-c"]
    compile(words[2], "command", "exec")  # quoted so that it can be pasted
    assert f"M.from_pretrained({str(folder)!r}, dtype='auto').merge_and_unload()" in words[2]
    assert "from peft import AutoPeftModelForCausalLM as M" in words[2]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_in_a_models_folder_is_refused_as_transformers_would_apply_it(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, layers=1)
    open_checkpoint(tmp_path).close()
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"holds an adapter \({name}\), which changes the model; merge it"):
        open_checkpoint(tmp_path)


def test_a_kind_that_cannot_be_merged(tmp_path: Path) -> None:
    write_adapter(tmp_path, peft_type="PROMPT_TUNING")
    with pytest.raises(CheckpointError, match=r"of kind PROMPT_TUNING, which can't be merged into weights") as caught:
        open_checkpoint(tmp_path)
    assert "python -c" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", '{"a":' * 100_000, '{"peft_type": 7, "base_model_name_or_path": [1]}'])
def test_a_damaged_description_changes_nothing(text: str, tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="merge it into the weights with peft"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["model/adapter", "."])
def test_an_adapter_one_folder_away_is_a_warning(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny(tmp_path / "model", layers=1)
    with caplog.at_level(logging.WARNING):
        open_checkpoint(tmp_path / "model").close()
        assert caplog.text == ""
        write_adapter(tmp_path / place)
        open_checkpoint(tmp_path / "model").close()
    assert "an adapter lies near the model and is not applied: " in caplog.text
    assert str(tmp_path / place / "adapter_config.json") in caplog.text


def test_a_folder_that_cannot_be_looked_into_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lost+found beside a model at a disk's root; root itself may look everywhere, so the refusal is played."""
    save_tiny(tmp_path, layers=1)
    closed = tmp_path / "lost+found"
    closed.mkdir()
    stat, asked = os.stat, []

    def refuse(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if isinstance(path, str | Path) and Path(path).parent == closed:
            asked.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    open_checkpoint(tmp_path).close()
    assert asked


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.embed_tokens.modules_to_save.default.weight",
    ],
)
def test_tensors_of_an_adapter_among_the_weights_are_refused(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, layers=1)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {name: np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(CheckpointError, match=r"holds 1 tensors of an adapter that isn't merged .*merge_and_unload"):
        open_checkpoint(tmp_path)
