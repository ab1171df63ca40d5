"""The reference equals the transformers model that the checkpoint was saved from, whatever the format."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.utils import ModelOutput

from qwen_aot.engines.verify.reference import Reference, step
from qwen_aot.exporter.checkpoint.hf.saving.config_json import config_json
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.checkpoints import save_tiny

IDS = np.arange(3, 20, dtype=np.int64)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tied": True}, id="tied"),
        pytest.param({"kv_heads": 2, "head_dim": 32}, id="gqa-head_dim"),
        pytest.param({"moe": {"mlp_only_layers": [0], "norm_topk_prob": True}}, id="moe-mixed"),
    ],
)
@pytest.mark.parametrize("source", ["folder", "facts"])
def test_logits_and_greedy_tokens(tmp_path: Path, options: dict[str, Any], source: str) -> None:
    model = save_tiny(tmp_path / "model", **options)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        seen = checkpoint
        if source == "facts":  # as for a .gguf file, which has no config.json
            seen = SimpleNamespace(  # type: ignore[assignment]
                path=tmp_path / "none.gguf",
                config=checkpoint.config,
                tensors=checkpoint.tensors,
                read=checkpoint.read,
            )
        reference = Reference(seen)
        with torch.inference_mode():
            expected = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
            generated = model.generate(
                torch.from_numpy(IDS)[None], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        np.testing.assert_allclose(reference.logits(IDS, 4), expected[4:], rtol=0, atol=1e-5)
        assert reference.greedy(IDS, 5) == generated[0, len(IDS) :].tolist()


class OldNames(torch.nn.Module):
    """A model of transformers before 5.24: the sum of all tokens so far, of which the cache holds the earlier ones."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = False) -> dict[str, Any]:
        assert use_cache
        total = input_ids.cumsum(1) + (past_key_values or 0)
        return ModelOutput(logits=total[..., None].float(), past_key_values=int(total[0, -1]))


class NewNames(OldNames):
    """The same since 5.24."""

    def forward(self, input_ids: torch.Tensor, cache: Any = None, use_cache: bool = False) -> dict[str, Any]:
        output = super().forward(input_ids, cache, use_cache)
        return ModelOutput(logits=output["logits"], cache=output["past_key_values"])


@pytest.mark.parametrize("names", [OldNames, NewNames])
def test_a_step_hands_on_the_cache_under_either_name(names: type[torch.nn.Module]) -> None:
    first, cache = step(names(), torch.tensor([[1, 2]]))
    second, _ = step(names(), torch.tensor([[4]]), cache)
    assert first.flatten().tolist() == [1, 3]
    assert second.flatten().tolist() == [7]


def test_steps_equal_one_pass(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", kv_heads=2)
    ids = torch.from_numpy(IDS)[None]
    with torch.inference_mode():
        first, cache = step(model, ids[:, :9])
        second, _ = step(model, ids[:, 9:], cache)
        expected = model(ids).logits
    np.testing.assert_allclose(torch.cat([first, second], 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ],
    ids=lambda value: value["rope_type"] if value else "default",
)
def test_rotary_scaling_reaches_transformers(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    override = {} if scaling is None else {"rope_parameters": {"rope_theta": 10000.0, **scaling}}
    save_tiny(tmp_path / "model", layers=1, **override)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        ours = AutoConfig.for_model(**config_json(checkpoint.config))
    theirs = AutoConfig.from_pretrained(tmp_path / "model")
    assert theirs.rope_parameters.items() <= ours.rope_parameters.items()
