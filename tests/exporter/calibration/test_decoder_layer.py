"""One layer over whole sequences against transformers' own, and what it shows of its projections' inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen_aot.exporter.calibration.decoder_layer import DecoderLayer, Reading, load_weights, readings
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import Role
from tests.checkpoints import save_tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gqa": {"kv_heads": 2},
    "head-dim": {"head_dim": 24},
    "yarn": {"rope_parameters": YARN},
    "moe": {"moe": {}},
    "moe-normalised": {"moe": {"norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 3}},
    "moe-then-dense": {"moe": {"mlp_only_layers": [1]}},
    "qwen3": {"generation": "qwen3", "kv_heads": 2, "head_dim": 24},
    "qwen3-moe": {"generation": "qwen3", "moe": {"norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 3}},
}
B, T = 2, 19
TOLERANCE = 2e-5  # of values around 1: float32 sums of at most 100 terms in another order


@pytest.mark.parametrize("name", MODELS)
def test_layers_give_what_transformers_layers_do(tmp_path: Path, name: str) -> None:
    model = save_tiny(tmp_path, **MODELS[name])
    tokens = torch.randint(0, 131, (B, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        streams = model(tokens, output_hidden_states=True).hidden_states
        final = model.model.norm
    with open_checkpoint(tmp_path) as checkpoint:
        compute = DecoderLayer(checkpoint.config, T)
        found = compute(load_weights(checkpoint, 0), streams[0])
        torch.testing.assert_close(found, streams[1], atol=TOLERANCE, rtol=TOLERANCE)
        last = compute(load_weights(checkpoint, 1), found)
        with torch.no_grad():
            torch.testing.assert_close(final(last), streams[2], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["gqa", "moe"])
def test_inputs_are_those_of_transformers_projections(tmp_path: Path, name: str) -> None:
    model = save_tiny(tmp_path, **MODELS[name])
    hidden = torch.randn(B, T, 64, generator=torch.Generator().manual_seed(0))
    expected: dict[str, Tensor] = {}
    layer = model.model.layers[0]
    modules = {
        "query": layer.self_attn.q_proj,
        "output": layer.self_attn.o_proj,
        **({"gate": layer.mlp.gate_proj, "down": layer.mlp.down_proj} if name == "gqa" else {}),
        **(
            {"shared_gate": layer.mlp.shared_expert.gate_proj, "shared_down": layer.mlp.shared_expert.down_proj}
            if name == "moe"
            else {}
        ),
    }
    for key, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, key=key: expected.__setitem__(key, args[0].flatten(0, -2)))
    with torch.no_grad():
        positions = torch.arange(T)[None]
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        layer(hidden, position_embeddings=model.model.rotary_emb(hidden, positions), attention_mask=mask)
    found: dict[str, Tensor] = {}
    with open_checkpoint(tmp_path) as checkpoint:
        DecoderLayer(checkpoint.config, T)(
            load_weights(checkpoint, 0), hidden, lambda reading, x: found.__setitem__(reading.name, x)
        )
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, atol=TOLERANCE, rtol=TOLERANCE)


def test_each_expert_sees_its_own_tokens(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, moe={})
    hidden = torch.randn(B, T, 64, generator=torch.Generator().manual_seed(0))
    seen: dict[Reading, Tensor] = {}
    with open_checkpoint(tmp_path) as checkpoint:
        weights = load_weights(checkpoint, 0)
        DecoderLayer(checkpoint.config, T)(weights, hidden, lambda reading, x: seen.__setitem__(reading, x))
        of_layer = list(readings(checkpoint.config, is_sparse=True))
    routed = {reading: x for reading, x in seen.items() if reading.places[0][0] is Role.EXPERT_GATE}
    shared = seen[next(reading for reading in seen if reading.places[0][0] is Role.SHARED_GATE)]
    chosen = (shared @ model.model.layers[0].mlp.gate.weight.T).topk(2, dim=-1).indices
    assert sum(len(x) for x in routed.values()) == B * T * 2
    for reading, x in routed.items():
        expected = shared[(chosen == reading.places[0][1]).any(-1)]
        torch.testing.assert_close(x, expected)
    assert [reading for reading in of_layer if reading in seen] == list(seen)


def test_every_matrix_that_is_rounded_is_read_once(tmp_path: Path) -> None:
    save_tiny(tmp_path, moe={"mlp_only_layers": [1]})
    with open_checkpoint(tmp_path) as checkpoint:
        for layer in (0, 1):
            is_sparse = checkpoint.config.is_sparse(layer)
            places = [place for reading in readings(checkpoint.config, is_sparse=is_sparse) for place in reading.places]
            weights = load_weights(checkpoint, layer)
            deciding = {Role.ROUTER, Role.SHARED_EXPERT_GATE}
            matrices = {place for place, w in weights.items() if w.dim() == 2 and place[0] not in deciding}
            assert len(places) == len(set(places))
            assert set(places) == matrices
