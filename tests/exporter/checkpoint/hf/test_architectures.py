"""Another architecture is one row and one file: `blocks`, whose checkpoint has a qwen2 model's weights, is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from qwen_aot.engines.verify.reference import Reference
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.architectures import ARCHITECTURES, Architecture
from qwen_aot.exporter.checkpoint.names import TensorNames
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.model.tensors import Role
from qwen_aot.exporter.weights.stitch import check_sources
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.checkpoint.hf.blocks import BLOCKS, parse
from tests.exporter.lowering.lowerings import export
from tests.exporter.stepper import Stepper

PROMPT = [5, 17, 3, 99, 42, 8]

# transformers' spelling -> the made-up one, written again, so that a slip in the row is seen
RENAMED = (
    ("model.embed_tokens.weight", "tokens"),
    ("model.norm.weight", "final.g"),
    ("lm_head.weight", "unembed"),
    ("model.layers.", "blocks."),
    ("input_layernorm.weight", "norm1.g"),
    ("post_attention_layernorm.weight", "norm2.g"),
    ("self_attn.q_proj.weight", "attn.wq"),
    ("self_attn.k_proj.weight", "attn.wk"),
    ("self_attn.v_proj.weight", "attn.wv"),
    ("self_attn.q_proj.bias", "attn.bq"),
    ("self_attn.k_proj.bias", "attn.bk"),
    ("self_attn.v_proj.bias", "attn.bv"),
    ("self_attn.o_proj.weight", "attn.wo"),
    ("mlp.gate_proj.weight", "ffn.w1"),
    ("mlp.up_proj.weight", "ffn.w3"),
    ("mlp.down_proj.weight", "ffn.w2"),
)


def renamed(name: str) -> str:
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name


def save_blocks(folder: Path, qwen2: Path, **added: NDArray[Any]) -> None:
    """The weights of a folder saved by transformers, as a `blocks` checkpoint, and tensors that are added."""
    folder.mkdir()
    raw = json.loads((qwen2 / "config.json").read_text())
    facts = {
        "model_type": "blocks",
        "vocab": raw["vocab_size"],
        "width": raw["hidden_size"],
        "ffn": raw["intermediate_size"],
        "depth": raw["num_hidden_layers"],
        "n_heads": raw["num_attention_heads"],
        "n_kv_heads": raw["num_key_value_heads"],
        "context": raw["max_position_embeddings"],
        "eps": raw["rms_norm_eps"],
        "theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(facts))
    state = {renamed(name): array for name, array in load_file(qwen2 / "model.safetensors").items()}
    save_file(state | added, folder / "model.safetensors")


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a row for one test."""

    def add(architecture: Architecture = BLOCKS) -> None:
        monkeypatch.setitem(ARCHITECTURES, "blocks", architecture)

    return add


@pytest.mark.parametrize("lowering", ["standard", "ort"])
def test_its_graph_is_that_of_the_same_weights_as_qwen2(lowering: str, tmp_path: Path, register: Any) -> None:
    model = save_tiny(tmp_path / "qwen2", kv_heads=2)
    save_blocks(tmp_path / "blocks", tmp_path / "qwen2")
    register()
    graph = export(tmp_path / "blocks", tmp_path / "out", lowering)
    same = export(tmp_path / "qwen2", tmp_path / "same", lowering)
    assert graph.read_bytes() == same.read_bytes()
    assert (tmp_path / "out/model.onnx.data").read_bytes() == (tmp_path / "same/model.onnx.data").read_bytes()
    logits = Stepper(graph, 1, 32).step([PROMPT])
    np.testing.assert_allclose(logits, reference_logits(model, [PROMPT])[:, -1], atol=1e-3)


def test_the_reference_of_verify_takes_its_facts_from_the_row(tmp_path: Path, register: Any) -> None:
    model = save_tiny(tmp_path / "qwen2", kv_heads=2)
    save_blocks(tmp_path / "blocks", tmp_path / "qwen2")
    register()
    with open_checkpoint(tmp_path / "blocks") as checkpoint:
        found = Reference(checkpoint).logits(np.array(PROMPT), 0)
    np.testing.assert_allclose(found, reference_logits(model, [PROMPT])[0].numpy(), rtol=0, atol=1e-5)


def test_a_row_that_swaps_two_roles_gives_other_logits(tmp_path: Path, register: Any) -> None:
    """What the test above judges by can tell."""
    model = save_tiny(tmp_path / "qwen2")
    save_blocks(tmp_path / "blocks", tmp_path / "qwen2")
    names = {role: renamed(role.template) for role in Role if renamed(role.template) != role.template}
    names |= {Role.KEY: names[Role.VALUE], Role.VALUE: names[Role.KEY]}
    register(Architecture(parse, TensorNames(names)))
    logits = Stepper(export(tmp_path / "blocks", tmp_path / "out", "standard"), 1, 32).step([PROMPT])
    assert np.abs(logits - reference_logits(model, [PROMPT])[:, -1].numpy()).max() > 0.1


def test_without_its_row_it_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "qwen2")
    save_blocks(tmp_path / "blocks", tmp_path / "qwen2")
    with pytest.raises(CheckpointError, match=r"model_type is 'blocks'; accepted: qwen, qwen2, qwen2_moe"):
        open_checkpoint(tmp_path / "blocks")


def test_a_tensor_of_no_role_is_named_as_in_the_file(tmp_path: Path, register: Any) -> None:
    save_tiny(tmp_path / "qwen2")
    save_blocks(tmp_path / "blocks", tmp_path / "qwen2", **{"blocks.0.attn.extra": np.zeros(3, np.float32)})
    register()
    with (
        open_checkpoint(tmp_path / "blocks") as checkpoint,
        pytest.raises(CheckpointError, match=r"no place for 1 tensors: blocks\.0\.attn\.extra"),
    ):
        check_sources(trace(checkpoint.config), checkpoint)


def test_a_name_of_transformers_own_is_not_taken_for_the_tensor_that_it_names_there(
    tmp_path: Path, register: Any
) -> None:
    save_tiny(tmp_path / "qwen2")
    save_blocks(tmp_path / "blocks", tmp_path / "qwen2", **{"lm_head.weight": np.zeros((131, 64), np.float32)})
    register()
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is called as in a qwen2 checkpoint, and config"):
        open_checkpoint(tmp_path / "blocks")
