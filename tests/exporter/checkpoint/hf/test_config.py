"""What is read of a config.json means what transformers means by it, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config import parse
from tests.exporter.checkpoint.hf.facts import BASES, TransformersError, logits, our_model, their_model

YARN = {"factor": 2.0, "original_max_position_embeddings": 24}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
ROPES: list[Any] = [
    None,
    {},
    {"type": "default"},
    {"rope_type": "default", "factor": 4.0},
    {"type": "linear", "factor": 1.0},
    {"type": "linear", "factor": 2},
    {"rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 50.0},
    {"rope_type": "default", "type": "yarn", **YARN},
    {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0},
    {"type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8},
    {"rope_type": "yarn", **YARN, "attention_factor": None, "beta_fast": None},
    {"rope_type": "yarn", **YARN, "attention_factor": 1.5, "truncate": False},
    {"rope_type": "yarn", **YARN, "truncate": None},
    {"rope_type": "yarn", **YARN, "mscale": 0.5, "mscale_all_dim": 2.0},
    {"rope_type": "yarn", **YARN, "rope_theta": 50.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}},
]
VALUES: Mapping[str, list[Any]] = {
    "hidden_act": ["silu", "swish", "gelu", "relu"],
    "num_key_value_heads": [1, 2, None],
    "head_dim": [8, 16, None],
    "num_hidden_layers": [1, 3],
    "rms_norm_eps": [1e-5, 0.3, 1],
    "tie_word_embeddings": [True, False, None],
    "rope_theta": [None, 10, 1e4],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "original_max_position_embeddings": [None, 8, 24],
    "max_position_embeddings": [16, 48],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "use_sliding_window": [True, False, None],
    "sliding_window": [None, 4, 23, 24, 48, 4096],
    "max_window_layers": [0, 1, 2, 28],
    "layer_types": [
        None,
        ["full_attention"] * 2,
        ["attention"] * 2,
        ["full_attention", "sliding_attention"],
        ["full_attention"],
    ],
    "attention_bias": [True, False],
    "qkv_bias": [True, False],
    "use_qk_norm": [True, False],
    "mlp_bias": [True, False],
    "is_causal": [True, False, None],
    "per_layer_config": [None, {}, {"1": {"intermediate_size": 8}}],
    "kv_sharing_modes": [None, ["store", "reuse"]],
    "text_config": [None, {"hidden_size": 16}],
    "pad_token_id": [None, -1, 3, 400],
    "eos_token_id": [None, -1, 3, [2, -1]],
    "bos_token_id": [None, -1, 3],
    "dtype": ["float64", "bfloat16", None],
    "torch_dtype": ["float64", "float16", None],
    "attention_dropout": [0.0, 0.5],
    "use_cache": [True, False],
    "norm_topk_prob": [True, False],
    "num_experts_per_tok": [1, 2, 4],
    "mlp_only_layers": [None, [], [1], [-1]],
    "decoder_sparse_step": [1, 2, 5],
    "shared_expert_intermediate_size": [4, 8],
    "num_local_experts": [2, 5],
    "attention_chunk_size": [None, 2],
}


@st.composite
def _changes(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3, unique=True))
    return {key: draw(st.sampled_from(VALUES[key])) for key in keys}


def verdict(raw: Mapping[str, Any], folder: Path) -> str:
    """What became of a file: refused here, refused by transformers, equal or different numbers."""
    try:
        config = parse(raw)
    except CheckpointError:
        return "refused"
    try:
        theirs, expected = their_model(raw, folder, config.max_position_embeddings)
    except TransformersError:
        return "transformers fails"
    ours = our_model_or_none(config, theirs)
    if ours is None:
        return "other shapes"
    found = logits(ours, config.max_position_embeddings)
    return "equal" if torch.allclose(expected, found, rtol=1e-4, atol=1e-4) else "different"


def our_model_or_none(config: Any, theirs: Any) -> Any:
    try:
        return our_model(config, theirs)
    except RuntimeError:  # load_state_dict
        return None


@settings(deadline=None, max_examples=40, derandomize=True)
@given(kind=st.sampled_from(sorted(BASES)), changes=_changes())
def test_accepted_facts_give_transformers_logits(
    kind: str, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    result = verdict(BASES[kind] | changes, tmp_path_factory.mktemp("config"))
    assert result in ("equal", "refused", "transformers fails"), (changes, result)


OF_EXPERTS = (
    *("norm_topk_prob", "num_experts_per_tok", "mlp_only_layers", "decoder_sparse_step"),
    *("shared_expert_intermediate_size", "qkv_bias", "attention_bias", "use_sliding_window", "layer_types"),
)
CASES = [("moe" if key in OF_EXPERTS else "dense", key) for key in VALUES]
CASES += [("dense", key) for key in OF_EXPERTS[5:]]
OF_QWEN3 = ("head_dim", "attention_bias", "qkv_bias", "use_qk_norm", "use_sliding_window", "sliding_window")
CASES += [("qwen3", key) for key in (*OF_QWEN3, "max_window_layers", "layer_types")]
CASES += [("qwen3_moe", key) for key in (*OF_QWEN3, *OF_EXPERTS[:5], "num_local_experts")]


# Which of a key's values, by their place, are refused; every other one is taken.
REFUSED: Mapping[str, set[int]] = {
    "hidden_act": {2, 3},
    "rope_scaling": {7, 15, 19, 20},  # two types, no factor, dynamic, a part of each head
    "rope_parameters": {7, 15, 19, 20},
    "partial_rotary_factor": {2},
    "layer_types": {3, 4},  # sliding, and fewer than layers
    "mlp_bias": {0},
    "is_causal": {1},
    "per_layer_config": {2},
    "kv_sharing_modes": {1},
    "text_config": {1},
    "pad_token_id": {3},  # beyond the vocabulary
    "use_qk_norm": {0},  # which only Qwen3 has
}
# With the first, transformers gives the output projection a bias; it doesn't read the others, which say another model.
OF_QWEN3_REFUSED: Mapping[str, set[int]] = {"attention_bias": {0}, "qkv_bias": {0}, "use_qk_norm": {1}}
REFUSED_OF: Mapping[str, Mapping[str, set[int]]] = {
    "qwen3": OF_QWEN3_REFUSED,
    "qwen3_moe": {**OF_QWEN3_REFUSED, "shared_expert_intermediate_size": {0, 1}},
}


@pytest.mark.parametrize(("kind", "key"), CASES)
def test_every_value_alone(kind: str, key: str, tmp_path: Path) -> None:
    results = [verdict(BASES[kind] | {key: value}, tmp_path / str(i)) for i, value in enumerate(VALUES[key])]
    refused = REFUSED_OF.get(kind, {}).get(key, REFUSED.get(key, set()))
    assert {i for i, result in enumerate(results) if result == "refused"} == refused, results
    assert set(results) <= {"equal", "refused", "transformers fails"}, results
    assert "equal" in results or len(refused) == len(results), results


# Values without effect, of which transformers makes the very same model: none may be refused.
WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "window above the layers": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4},
    "window of the context": {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 24},
    "window not used": {"use_sliding_window": False, "max_window_layers": 0, "sliding_window": 4},
    "window said full": {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2},
    "old layer types": {"layer_types": ["attention"] * 2},
    "no padding": {"pad_token_id": -1},
    "no ends": {"eos_token_id": [-1], "bos_token_id": -1},
    "ids of a larger vocabulary": {"eos_token_id": [3, 400], "bos_token_id": 400},
    "no experts' layers": {"mlp_only_layers": []},
    "rope twice": {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "yarn", **YARN}},
    "rope twice, theta once": {
        "rope_scaling": {"type": "linear", "factor": 2.0, "rope_type": "linear"},
        "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 100.0},
    },
    "rope twice, default": {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 100.0}},
    "rope null": {"rope_scaling": None, "rope_parameters": {}},
    "type twice": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    "linear by one": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "key of another type": {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32.0}},
    "float64": {"torch_dtype": "float64"},
    "float64, new": {"dtype": "float64"},
    "swish": {"hidden_act": "swish"},
    "causal": {"is_causal": True},
    "no heads' size": {"num_key_value_heads": 1, "kv_sharing_modes": None},
    "no scaling of scores": {"attn_logit_softcapping": None},
    "empty architectures": {"architectures": None},
    "pruned heads": {"pruned_heads": {}},
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("changes", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_what_has_no_effect_is_not_refused(changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    if kind == "qwen3_moe" and changes.get("use_sliding_window") and changes["sliding_window"] < 24:
        # Its windows are of all layers, whatever else is said: transformers gives other numbers than without them.
        assert verdict(BASES[kind] | changes, tmp_path) == "refused"
        expected, found = (
            their_model(BASES[kind] | used, tmp_path / name, 16)[1]
            for name, used in (("with", changes), ("without", {}))
        )
        assert not torch.allclose(expected, found, rtol=1e-3, atol=1e-3)
        return
    if kind == "moe" and changes is WITHOUT_EFFECT["window above the layers"]:
        changes = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 4}  # it counts from below
    assert verdict(BASES[kind] | changes, tmp_path) == "equal"


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"is_causal": False},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rms_norm_eps": 0.3},
    ],
    ids=str,
)
def test_the_comparison_tells_such_changes_apart(changes: dict[str, Any], tmp_path: Path) -> None:
    """What the tests above judge by: facts that lack a change give other logits."""
    theirs, expected = their_model(BASES["dense"] | changes, tmp_path, 24)
    ours = our_model(parse(BASES["dense"]), theirs)
    assert not torch.allclose(expected, logits(ours, 24), rtol=1e-4, atol=1e-4)
