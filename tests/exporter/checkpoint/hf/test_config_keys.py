"""Every key on which transformers may act has a place: read, refused by name, or proven to be without effect.

The keys are found in transformers' own source, so that one of a newer version fails here until it has a place.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf import config_keys
from qwen_aot.exporter.checkpoint.hf.config import parse
from tests.exporter.checkpoint.hf.facts import BASES, DENSE, TransformersError, their_model

PLACED = config_keys.READ | config_keys.READ_MOE | config_keys.HARMLESS | config_keys.ACCEPTED.keys()

# Where the decoder's numbers are made, and what they ask of the configuration.
MODULES = (
    "models.qwen2.modeling_qwen2",
    "models.qwen2_moe.modeling_qwen2_moe",
    "models.qwen3.modeling_qwen3",
    "models.qwen3_moe.modeling_qwen3_moe",
    "models.llama.modeling_llama",
    "masking_utils",
    "cache_utils",
    "modeling_rope_utils",
    "integrations.moe",
    "integrations.sdpa_attention",
)

# Attributes that no config.json sets, or not for these architectures.
NOT_KEYS: Mapping[str, frozenset[str]] = {
    "methods and what they keep": frozenset(
        {
            *("get_text_config", "standardize_rope_params", "validate_rope", "nested_rope_parameter_keys"),
            *("default_theta", "_rope_type_labels", "json"),
        }
    ),
    "of layer types that are refused": frozenset({"attention_chunk_size", "number_of_conv_states"}),
    # integrations.moe builds other architectures' experts with it.
    "of other architectures' experts": frozenset({"n_routed_experts"}),
}


def asked_of_config(source: str) -> Iterator[str]:
    """Names in `config.NAME`, `self.config.NAME`, and in getattr and hasattr of them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            yield node.attr
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr")
            and _is_config(node.args[0])
            and isinstance(node.args[1], ast.Constant)
        ):
            yield str(node.args[1].value)


def _is_config(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.endswith("config") and name not in ("generation_config", "quantization_config")


def _unplaced(names: set[str]) -> set[str]:
    return names - PLACED - frozenset().union(*NOT_KEYS.values())


@pytest.mark.parametrize("module", MODULES)
def test_what_the_code_asks_for_has_a_place(module: str) -> None:
    source = inspect.getsource(importlib.import_module(f"transformers.{module}"))
    asked = set(asked_of_config(source))
    assert module.startswith("integrations") or asked, "the walk found nothing: it looks for the wrong thing"
    assert _unplaced(asked) == set()


def test_the_walk_sees_every_way_of_asking() -> None:
    source = (
        'def f(self, config):\n a = config.one\n b = self.config.two\n c = getattr(config, "three", 1)\n'
        ' d = hasattr(self.config, "four")\n e = text_config.five\n'
    )
    assert set(asked_of_config(source)) == {"one", "two", "three", "four", "five"}
    assert _unplaced({"vocab_size", "a_key_of_tomorrow"}) == {"a_key_of_tomorrow"}


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig, LlamaConfig])
def test_what_the_classes_hold_has_a_place(kind: Any) -> None:
    assert _unplaced({field.name for field in dataclasses.fields(kind)} | set(kind().to_dict())) == set()


def test_what_is_left_of_generation_has_a_place() -> None:
    """Old files keep it in config.json; transformers drops these when it reads one."""
    assert _unplaced(set(GenerationConfig._get_default_generation_params())) == set()


def test_a_key_has_one_place() -> None:
    places = [config_keys.READ, config_keys.READ_MOE, config_keys.HARMLESS, frozenset(config_keys.ACCEPTED)]
    assert sum(map(len, places)) == len(PLACED)
    reasons = config_keys.HARMLESS_BY_REASON.values()
    assert sum(map(len, reasons)) == len(config_keys.HARMLESS)


@pytest.mark.parametrize("key", sorted(set(config_keys.ACCEPTED) - {"hidden_act", "pruned_heads"}))
def test_other_values_are_refused_by_name(key: str) -> None:
    with pytest.raises(CheckpointError, match=rf'^{key} is "other"; not supported; accepted: '):
        parse(DENSE | {key: "other"})


# Values that would change most, had a key an effect. One model has all of a reason's keys.
LOUD: Mapping[str, Any] = {
    "attention_dropout": 0.9,
    "initializer_range": 5.0,
    "router_aux_loss_coef": 9.0,
    "transformers_version": "4.0.0",
    "tokenizer_class": "None",
    "use_cache": False,
    "return_dict": True,
    "output_hidden_states": True,
    "output_attentions": False,
    "output_router_logits": True,
    "tie_last_hidden_states": True,
    "chunk_size_feed_forward": 3,
    "pretraining_tp": 2,
    "attn_implementation": "eager",
    "_attn_implementation": "eager",
    "experts_implementation": "eager",
    "_experts_implementation": "eager",
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "num_labels": 3,
    "problem_type": "regression",
    "is_decoder": True,
    "sep_token_id": 2,
    "cross_attention_hidden_size": 8,
    "task_specific_params": {"x": {"max_length": 3}},
    "temperature": 0.01,
    "repetition_penalty": 9.0,
    "suppress_tokens": [1, 2, 3],
    "bad_words_ids": [[1]],
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("reason", config_keys.HARMLESS_BY_REASON)
def test_harmless_keys_change_no_logits(
    reason: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = BASES[kind]
    keys = {key: LOUD.get(key, 7) for key in config_keys.HARMLESS_BY_REASON[reason]}
    if reason.startswith("defaults of generation"):  # transformers checks what some of these hold
        keys = {key: value for key, value in keys.items() if key in LOUD}
    _, expected = their_model(base, tmp_path / "base", 16)
    _, found = their_model(base | keys, tmp_path / "keys", 16)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with caplog.at_level(logging.WARNING, "qwen_aot"):
        assert parse(base | keys) == parse(base)
    assert not [record for record in caplog.records if record.name.startswith("qwen_aot")]


def test_the_comparison_hears_a_key_that_acts(tmp_path: Path) -> None:
    _, expected = their_model(DENSE, tmp_path / "base", 16)
    _, found = their_model(DENSE | {"is_causal": False}, tmp_path / "keys", 16)
    assert not torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TransformersError):
        their_model(DENSE | {"hidden_act": "frobnicate"}, tmp_path / "broken", 16)
