"""The reference is read past our own readers: a fault of theirs that verify must see is on one side only."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_aot.engines.verify.reference import Reference
from qwen_aot.engines.verify.reference_model import BY_GGUF, BY_TRANSFORMERS, BY_US
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.gguf import reader as gguf_reader
from qwen_aot.exporter.checkpoint.hf.folder import HfFolderCheckpoint
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from tests.checkpoints import reference_logits, save_tiny, tiny_config, tiny_model
from tests.gguf_files import save_gguf

IDS = np.arange(3, 20, dtype=np.int64)
GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"kv_heads": 2, "head_dim": 32}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen2moe": ("qwen2moe", {"moe": {"norm_topk_prob": True}}),
    "qwen3": ("qwen3", {"generation": "qwen3", "kv_heads": 2, "head_dim": 32}),
    "qwen3moe": ("qwen3moe", {"generation": "qwen3", "moe": {"norm_topk_prob": True}}),
    "llama": ("llama", {"kv_heads": 2, "tied": True, "head_dim": 8}),
}


def gguf_file(path: Path, architecture: str, **shape: Any) -> torch.nn.Module:
    """A tiny model as GGUF; a llama file has no biases, so the model has none either."""
    model = tiny_model(tiny_config(**shape))
    if architecture == "llama":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()
    facts = {"qwen2moe.expert_weights_norm": True} if architecture == "qwen2moe" else None
    save_gguf(path, model, architecture, facts=facts)
    return model


@pytest.mark.parametrize(("architecture", "shape"), GGUF.values(), ids=GGUF)
def test_a_gguf_file_is_read_by_others(architecture: str, shape: dict[str, Any], tmp_path: Path) -> None:
    model = gguf_file(tmp_path / "m.gguf", architecture, **shape)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        reference = Reference(checkpoint)
    assert reference.read_by == BY_GGUF
    expected = reference_logits(model, [IDS.tolist()])[0].numpy()
    np.testing.assert_allclose(reference.logits(IDS, 0), expected, rtol=0, atol=1e-5)


def test_quantized_gguf_tensors_are_what_the_package_makes_of_them(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(kv_heads=2))
    written = save_gguf(tmp_path / "m.gguf", model, "qwen2", kind=gguf.GGMLQuantizationType.Q5_0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(written[name]))
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        found = Reference(checkpoint).logits(IDS, 0)
    np.testing.assert_allclose(found, reference_logits(model, [IDS.tolist()])[0].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
        {"rope.scale_linear": 4.0},
    ],
    ids=["linear", "yarn", "old linear"],
)
def test_rotary_scaling_of_a_gguf_file(scaling: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(tiny_config())
    save_gguf(tmp_path / "m.gguf", model, "qwen2", facts={f"qwen2.{key}": value for key, value in scaling.items()})
    kind, factor = scaling.get("rope.scaling.type", "linear"), scaling.get("rope.scaling.factor", 4.0)
    parameters = {"rope_theta": 10000.0, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = 128
    scaled = tiny_model(tiny_config(rope_parameters=parameters))
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        found = Reference(checkpoint).logits(IDS, 0)
    np.testing.assert_allclose(found, reference_logits(scaled, [IDS.tolist()])[0].numpy(), rtol=0, atol=1e-5)
    assert np.abs(found - reference_logits(model, [IDS.tolist()])[0].numpy()).max() > 0.01


@pytest.mark.parametrize("number", [0, 2])
def test_a_split_gguf_file_is_read_whole(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Splitting(gguf.GGUFWriter):  # type: ignore[misc]
        def __init__(self, path: Path, arch: str) -> None:
            super().__init__(path, arch, split_max_tensors=9, small_first_shard=True)

    monkeypatch.setattr(gguf, "GGUFWriter", Splitting)
    model = gguf_file(tmp_path / "m.gguf", "llama", tied=True)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 3
    with open_checkpoint(parts[number]) as checkpoint:
        reference = Reference(checkpoint)
    assert reference.read_by == BY_GGUF
    expected = reference_logits(model, [IDS.tolist()])[0].numpy()
    np.testing.assert_allclose(reference.logits(IDS, 0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [{"kv_heads": 2}, {"moe": {}, "layers": 1}], ids=["dense", "moe"])
@pytest.mark.parametrize("around", ["_orig_mod.", "module.", "language_model."])
def test_names_that_a_framework_put_around_a_models_are_no_other_model(
    around: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "m", **shape)
    file = tmp_path / "m" / "model.safetensors"
    save_file({around + name: tensor.clone() for name, tensor in load_file(file).items()}, file)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        reference = Reference(checkpoint)
    assert reference.read_by == BY_TRANSFORMERS
    expected = reference_logits(model, [IDS.tolist()])[0].numpy()
    np.testing.assert_allclose(reference.logits(IDS, 0), expected, rtol=0, atol=1e-5)


def test_nothing_is_said_of_biases_that_a_checkpoint_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it misses transformers draws, and says so in a table; here they are zeros."""
    model = save_tiny(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith(".bias")}, file)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_bias": False}))
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])  # it doesn't propagate
    with open_checkpoint(tmp_path / "m") as checkpoint:
        found = Reference(checkpoint).logits(IDS, 0)
    np.testing.assert_allclose(found, reference_logits(model, [IDS.tolist()])[0].numpy(), rtol=0, atol=1e-5)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("transformers")] == []


def test_faults_of_our_gguf_reader_dont_reach_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gguf_file(tmp_path / "m.gguf", "llama", kv_heads=2)
    real = gguf_reader.parse
    monkeypatch.setattr(
        gguf_reader, "_row_index", lambda stored, rows: np.arange(stored.tensor.shape[0])[rows or slice(None)]
    )
    monkeypatch.setattr(gguf_reader, "parse", lambda *facts: dataclasses.replace(real(*facts), rope_theta=500.0))
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config.rope_theta == 500.0
        found = Reference(checkpoint).logits(IDS, 0)
    np.testing.assert_allclose(found, reference_logits(model, [IDS.tolist()])[0].numpy(), rtol=0, atol=1e-5)


def test_faults_of_our_folder_reader_dont_reach_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "m", kv_heads=2)
    real = HfFolderCheckpoint.read
    monkeypatch.setattr(HfFolderCheckpoint, "read", lambda *place: real(*place)[::-1])
    with open_checkpoint(tmp_path / "m") as checkpoint:
        reference = Reference(checkpoint)
    assert reference.read_by == BY_TRANSFORMERS
    np.testing.assert_allclose(
        reference.logits(IDS, 0), reference_logits(model, [IDS.tolist()])[0].numpy(), rtol=0, atol=1e-5
    )


def test_random_weights_come_from_where_they_are_made(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        random = RandomCheckpoint(checkpoint.config, 3, str(tmp_path / "m"))  # a folder of that name is none of its
    reference = Reference(random)
    assert reference.read_by == BY_US
    embedding = reference._model.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(embedding, random.read("model.embed_tokens.weight").astype(np.float32))


def test_a_model_that_isnt_whole_is_no_reference(tmp_path: Path) -> None:
    """What transformers doesn't find it draws, and says so only in a table."""
    save_tiny(tmp_path / "m", tied=True)
    config = tmp_path / "m" / "config.json"
    with open_checkpoint(tmp_path / "m") as checkpoint:
        raw = json.loads(config.read_text())
        config.write_text(json.dumps(raw | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}))
        with pytest.raises(CheckpointError, match=r"another model .*\(missing: model\.layers\.2\.input_layernorm"):
            Reference(checkpoint)
        config.write_text(json.dumps(raw | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}))
        with pytest.raises(CheckpointError, match=r"\(left over: model\.layers\.1\."):
            Reference(checkpoint)
