from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2MoeConfig

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.errors import BuildError, CheckpointError
from qwen_aot.exporter.checkpoint.hf.config import parse, read_folder
from qwen_aot.exporter.model.config import MoeConfig, RopeScaling
from qwen_aot.exporter.model.limits import check_products
from qwen_aot.exporter.model.tensors import num_activated_parameters, num_parameters
from tests.checkpoints import tiny_config, tiny_model

DENSE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SPARSE: dict[str, Any] = DENSE | {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}

SHAPES = {
    "mha": {},
    "gqa": {"kv_heads": 2},
    "mqa-tied": {"kv_heads": 1, "tied": True},
    "head_dim": {"head_dim": 32, "kv_heads": 2},
    "one-layer": {"layers": 1, "vocab": 97},
    "moe": {"moe": {}},
    "moe-norm": {"moe": {"norm_topk_prob": True}, "kv_heads": 2},
    "moe-mixed": {"moe": {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, "layers": 6},
    "moe-no-bias": {"moe": {"qkv_bias": False}},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_transformers(shape: dict[str, Any], tmp_path: Path) -> None:
    reference = tiny_config(**shape)
    reference.save_pretrained(tmp_path)
    config, _ = read_folder(tmp_path)
    model = tiny_model(reference)
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        assert getattr(config, name) == getattr(reference, name)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(reference, name)
    attention = model.model.layers[0].self_attn
    assert config.head_dim == attention.head_dim
    assert config.query_size == attention.q_proj.out_features
    assert config.key_value_size == attention.k_proj.out_features
    assert config.attention_bias == (attention.q_proj.bias is not None)
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    sparse = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert [config.is_sparse(layer) for layer in range(len(sparse))] == sparse
    if config.moe is not None:
        assert config.moe.norm_topk_prob == reference.norm_topk_prob
        assert config.moe.num_experts_per_tok == reference.num_experts_per_tok
        idle = reference.num_experts - reference.num_experts_per_tok
        expert = 3 * reference.hidden_size * reference.moe_intermediate_size
        assert num_activated_parameters(config) == num_parameters(config) - sum(sparse) * idle * expert
    else:
        assert num_activated_parameters(config) == num_parameters(config)


@pytest.mark.parametrize(("raw", "kind"), [(DENSE, Qwen2Config), (SPARSE, Qwen2MoeConfig)], ids=["dense", "moe"])
def test_absent_keys_have_transformers_defaults(raw: dict[str, Any], kind: type) -> None:
    reference = kind(**{key: value for key, value in raw.items() if key != "model_type"})
    config = parse(raw)
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.head_dim == reference.hidden_size // reference.num_attention_heads
    assert config.attention_bias
    if config.moe is not None:
        assert config.moe.norm_topk_prob == reference.norm_topk_prob
        assert config.moe.sparse_layers == frozenset(range(4))


def test_old_and_new_spelling_agree() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 128}
    old = DENSE | {"rope_theta": 1e6, "torch_dtype": "float16", "rope_scaling": {"type": "yarn", **yarn}}
    new = DENSE | {
        "dtype": "float16",
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **yarn},
        "layer_types": ["full_attention"] * 4,
    }
    nested = new | {"rope_parameters": {"full_attention": new["rope_parameters"]}}
    config = parse(old)
    assert config == parse(new) == parse(nested)
    assert config.torch_dtype == "float16"
    assert config.rope_theta == 1e6
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 4.0
    assert config.rope_scaling.original_max_position_embeddings == 128


@pytest.mark.parametrize("absent", [None, {}, {"rope_type": "default"}, {"type": "default"}], ids=str)
def test_no_rope_scaling(absent: Any) -> None:
    assert parse(DENSE | {"rope_scaling": absent}).rope_scaling is None


def test_stop_ids_of_both_files_are_merged() -> None:
    raw = DENSE | {"eos_token_id": 5, "bos_token_id": None}
    config = parse(raw, {"eos_token_id": [7, 5], "bos_token_id": 3, "pad_token_id": 4})
    assert config.eos_token_ids == (7, 5)
    assert (config.bos_token_id, config.pad_token_id) == (3, 4)
    assert parse(DENSE | {"eos_token_id": [1, 2, 1]}).eos_token_ids == (1, 2)
    assert parse(DENSE).eos_token_ids == ()


def test_generation_config_is_read_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE | {"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 6}))
    assert read_folder(tmp_path)[0].eos_token_ids == (6, 5)


REFUSED = {
    "model_type": ({"model_type": "llama"}, r"model_type is 'llama'; accepted: qwen, qwen2, qwen2_moe"),
    "no model_type": ({"model_type": None}, "model_type is None"),
    "activation": ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; not supported; accepted: "silu"'),
    "window": (
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 511},
        "use_sliding_window is true, so that layer 2 attends to the last 511 tokens only .*than the context of 512; .* "
        "a sliding_window from 512, or the context .* cut to 511",
    ),
    "window of named layers": (
        {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4, "sliding_window": 4},
        r"layer_types\[0\] is 'sliding_attention': it attends to the last 4 tokens",
    ),
    "no window": (
        {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4},
        "attends to a window, but use_sliding_window is False",
    ),
    "window beyond the scaled context": (
        {
            "use_sliding_window": True,
            "max_window_layers": 0,
            "sliding_window": 512,
            "rope_scaling": {"type": "yarn", "factor": 2.0},
        },
        "fewer than the context of 1024",
    ),
    "both directions": ({"is_causal": False}, "is_causal is false; not supported; accepted: true"),
    "nested": ({"text_config": {"hidden_size": 8}}, "text_config is {.*}; not supported; accepted: null"),
    "layer by layer": ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is .*; not supported"),
    "two rope types": (
        {"rope_scaling": {"type": "yarn", "rope_type": "default"}},
        "rope_type is 'default' and type is",
    ),
    "rope theta twice": (
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 1e6}},
        "or two that mean the same",
    ),
    "two ropes": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}},
        "rope_parameters has 'sliding_attention' beside 'full_attention'",
    ),
    "truncate": ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": None}}, "truncate is null"),
    "far": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0**20}},
        r"rope_scaling.factor \(1048576.0\) x original_max_position_embeddings \(512\) is 536,870,912; accepted: up to",
    ),
    "attention factor": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1e30}},
        r"attention_factor is 1e\+30; accepted: numbers from .* to 100",
    ),
    "layer_types": (
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        r"layer_types\[3\] is 'sliding",
    ),
    "layer_types length": (
        {"layer_types": ["full_attention"]},
        r"accepted: a list of num_hidden_layers \(4\)",
    ),
    "dynamic": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type is 'dynamic'; not supported",
    ),
    "longrope": (
        {"rope_parameters": {"rope_type": "longrope"}},
        "rope_type is 'longrope'; .*linear, yarn, llama3",
    ),
    "mrope": ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "'mrope_section'; not supported"),
    "rope list": ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; accepted: an object or null"),
    "partial rotary": (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is 0.5; not supported; accepted: 1",
    ),
    "partial rotary, new": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5",
    ),
    "rope_type list": ({"rope_scaling": {"type": ["linear"]}}, r"rope_type is \['linear'\]; not supported"),
    "rope twice": (
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "rope_scaling is .*'yarn'.* and rope_parameters is .*'default'.*; accepted: one of them",
    ),
    "nested rope": ({"rope_parameters": {"full_attention": 5}}, "rope_parameters is 5; accepted: an object"),
    "theta of 1": ({"rope_theta": 1}, r"rope_theta is 1\.0; accepted: numbers greater than 1"),
    "huge theta": ({"rope_theta": 10**400}, "rope_theta is a number of 401 digits"),
    "huge size": ({"vocab_size": 10**400}, "vocab_size is a number of 401 digits; .* from 1 to 16777216"),
    "huge depth": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; .* from 1 to 1000"),
    "architectures": ({"architectures": "Qwen2ForCausalLM"}, "is 'Qwen2ForCausalLM'; accepted: a list of names"),
    "factor missing": ({"rope_scaling": {"type": "linear"}}, "factor is missing; accepted: a number"),
    "factor text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'; accepted: a number"),
    "architecture": (
        {"architectures": ["Qwen2ForSequenceClassification"]},
        "names 'Qwen2ForSequenceClassification'",
    ),
    "missing": ({"hidden_size": None}, "hidden_size is None; accepted: a whole number"),
    "float count": ({"vocab_size": 10.5}, "vocab_size is 10.5; accepted: a whole number"),
    "bool count": ({"vocab_size": True}, "vocab_size is True; accepted: a whole number"),
    "flag": ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; accepted: true or false"),
    "heads": ({"num_attention_heads": 3}, "hidden_size is 64, not a multiple of num_attention_heads"),
    "dtype": ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; accepted: bfloat16, float16, float32, float64"),
    "eos": ({"eos_token_id": ["x"]}, "eos_token_id is 'x'; accepted: a whole number"),
    "theta": ({"rope_theta": "many"}, "rope_theta is 'many'; accepted: a number"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(DENSE | change)


REFUSED_MOE = {
    "step": ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; accepted: whole numbers from 1"),
    "dense layers": ({"mlp_only_layers": "0"}, "mlp_only_layers is '0'; accepted: a list of layer indices"),
    "top k": ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5; accepted: 1 to num_experts \(4\)"),
    "experts": ({"num_experts": 0}, "num_experts is 0; accepted: whole numbers from 1"),
    "many experts": ({"num_experts": 10**12}, "num_experts is 1000000000000; .* from 1 to 10000"),
    "huge depth": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; .* from 1 to 1000"),
    "no shared size": ({"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size is None"),
    "shared": ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size is -1"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED_MOE.values(), ids=REFUSED_MOE)
def test_refuses_expert_facts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(SPARSE | change)


OUT_OF_RANGE = {
    "model_type": ({"model_type": "qwen3"}, "model_type is 'qwen3'"),
    "layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0; accepted: whole numbers from 1"),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads"),
    "head_dim": ({"head_dim": 15}, "head_dim is 15; rotary embedding needs an even number"),
    "eps": ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; accepted: numbers from 1.17549e-38 to"),
    "theta": ({"rope_theta": float("nan")}, "rope_theta is nan"),
    "moe": ({"model_type": "qwen2_moe"}, "needs expert facts"),
    "no moe": ({"moe": MoeConfig(4, 2, 24, 40, False, frozenset({0}))}, "has no experts"),
    "pad": ({"pad_token_id": 131}, r"pad_token_id holds 131; accepted: 0 to vocab_size - 1 \(130\)"),
    "bos": ({"bos_token_id": -1}, "bos_token_id holds -1"),
    "dtype": ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
    "sparse layer": (
        {"model_type": "qwen2_moe", "moe": MoeConfig(4, 2, 24, 40, False, frozenset({4}))},
        "sparse layer 4 does not exist; accepted: 0 to 3",
    ),
}


@pytest.mark.parametrize(("change", "message"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_validates_once_constructed(change: dict[str, Any], message: str) -> None:
    config = parse(DENSE)
    with pytest.raises(CheckpointError, match=message):
        replace(config, **change)


BAD_SCALINGS = {
    "type": (
        {"rope_type": "ntk"},
        "rope scaling 'ntk' is not supported; accepted: none, linear, yarn, llama3",
    ),
    "factor": ({"factor": 0.5}, "rope_scaling.factor is 0.5; accepted: numbers from 1"),
    "attention": ({"attention_factor": 0.0}, "rope_scaling.attention_factor is 0.0"),
    "betas": ({"beta_fast": 0.5}, r"rope_scaling.beta_fast is 0.5; accepted: from beta_slow \(1.0\)"),
    "original": ({"original_max_position_embeddings": None}, "is missing; yarn needs it"),
    "frequencies": ({"high_freq_factor": 1.0}, "rope_scaling.high_freq_factor is 1.0; it must be greater"),
}


@pytest.mark.parametrize(("change", "message"), BAD_SCALINGS.values(), ids=BAD_SCALINGS)
def test_validates_rope_scaling(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(RopeScaling("yarn", 4.0, original_max_position_embeddings=128), **change)


def test_unknown_keys_are_told_and_harmless_ones_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse(DENSE | {"use_cache": True, "transformers_version": "4.37.0", "sliding_window": 4096})
        assert caplog.records == []
        parse(DENSE | {"frobnicate": 1, "auto_map": {"AutoModelForCausalLM": "code.Own"}})
    assert "ignored: frobnicate" in caplog.text
    assert "code of its own (auto_map), which is never run" in caplog.text


BROKEN_FILES = {
    "text": ("{", "is not valid JSON"),
    "list": ("[]", "holds a JSON list; accepted: an object"),
    "deep": ("[" * 100_000, "is not valid JSON"),
    "digits": ('{"vocab_size": ' + "9" * 5000 + "}", "is not valid JSON"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json; accepted: a folder saved by transformers"):
        read_folder(tmp_path)


def test_cache_bytes() -> None:
    config = parse(DENSE)
    # keys and values, 4 layers, 2 heads of 16, fp16
    assert config.kv_bytes_per_token(2) == 2 * 4 * 2 * 16 * 2


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.sampled_from([10**400, -(10**400)]),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "full_attention", "partial_rotary_factor"]),
        st.none() | st.integers() | st.just("yarn") | st.lists(st.integers(), max_size=1) | st.just(10**400),
    ),
)


@settings(deadline=None, max_examples=300)
@given(
    key=st.sampled_from(
        [
            *SPARSE,
            *("head_dim", "rope_theta", "rope_scaling", "rope_parameters", "eos_token_id", "layer_types"),
            *("architectures", "mlp_only_layers", "decoder_sparse_step", "dtype", "rms_norm_eps", "hidden_act"),
        ]
    ),
    value=JSON_VALUES,
)
def test_any_value_gives_a_config_or_a_checkpoint_error(key: str, value: Any) -> None:
    try:
        config = parse(SPARSE | {key: value})
    except CheckpointError:
        return
    assert num_parameters(config) > 0


def test_hash_and_equality_are_by_value() -> None:
    assert hash(parse(SPARSE)) == hash(parse(dict(SPARSE)))


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
CONTEXTS: dict[str, tuple[dict[str, Any], int]] = {
    "as published": ({"rope_scaling": {"type": "yarn", **YARN}}, 131072),
    "as published, new type": ({"rope_scaling": {"rope_type": "yarn", **YARN}}, 131072),
    "as published, new spelling": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}}, 131072),
    "without the original length": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 131072),
    "original beside it": (
        {"original_max_position_embeddings": 16384, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        65536,
    ),
    "multiplied already": ({"max_position_embeddings": 131072, "rope_scaling": {"type": "yarn", **YARN}}, 131072),
    "factor left out": (
        {"max_position_embeddings": 65536, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 32768}},
        65536,
    ),
    "more than the factor": ({"max_position_embeddings": 200000, "rope_scaling": {"type": "yarn", **YARN}}, 200000),
    "a fraction": ({"rope_scaling": {"type": "yarn", **YARN, "factor": 2.5}}, 81920),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 32768),
    "llama3": (
        {
            "rope_scaling": {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        32768,
    ),
}


@pytest.mark.parametrize(("change", "context"), CONTEXTS.values(), ids=CONTEXTS)
def test_yarn_extends_the_context(change: dict[str, Any], context: int) -> None:
    config = parse(DENSE | {"max_position_embeddings": 32768, "rope_theta": 1e6} | change)
    assert config.max_position_embeddings == context
    assert BuildSpec().context_for(config.max_position_embeddings) == context
    assert BuildSpec(max_context=context).context_for(config.max_position_embeddings) == context
    with pytest.raises(BuildError, match=f"is more than the model's {context} tokens"):
        BuildSpec(max_context=context + 1).context_for(config.max_position_embeddings)


# 250 bytes each: none may take long, or much memory.
PRODUCTS = {
    "width": ({"hidden_size": 2147483644}, "hidden_size is 2147483644; .* to 1048576"),
    "heads": ({"num_attention_heads": 8192, "head_dim": 1024}, "num_attention_heads x head_dim is 8,388,608; accepted"),
    "kv heads": (
        {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2},
        "num_attention_heads x head_dim is 2,097,152; accepted",
    ),
    "layers by width": (
        {"num_hidden_layers": 1000, "intermediate_size": 2**20},
        "num_hidden_layers x the widest projection is 1,048,576,000; accepted: up to 67,108,864",
    ),
    "experts by layers": (
        {"num_hidden_layers": 1000, "num_experts": 10000, "model_type": "qwen2_moe"},
        r"number of tensors \(num_hidden_layers x num_experts\) is 30,016,000; accepted: up to 250,000",
    ),
    "experts by width": (
        {"num_experts": 10000, "moe_intermediate_size": 2**20, "model_type": "qwen2_moe"},
        "num_experts x moe_intermediate_size x hidden_size x 2 is 1,342,177,280,000; accepted",
    ),
    "vocabulary": (
        {"vocab_size": 2**24, "hidden_size": 2**18, "num_attention_heads": 2**10},
        "vocab_size x hidden_size is 4,398,046,511,104; accepted: up to 1,099,511,627,776",
    ),
    "rotary": (
        {"max_position_embeddings": 2**28, "head_dim": 128},
        "max_position_embeddings x head_dim is 34,359,738,368; accepted: up to 17,179,869,184",
    ),
    "context": ({"max_position_embeddings": 2**31 - 1}, "max_position_embeddings is 2147483647; .* to 268435456"),
}


@pytest.mark.parametrize(("change", "message"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_capped(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(SPARSE | DENSE | change)


def test_the_largest_published_decoders_are_far_from_the_caps() -> None:
    """By their config.json: Llama 3.1 405B, DeepSeek V3, Kimi K2 (layers, hidden, widest, heads x size, experts)."""
    for layers, hidden, width, queries, experts in (
        (126, 16384, 53248, 16384, 0),
        (61, 7168, 18432, 128 * 192, 256),
        (61, 7168, 18432, 64 * 192, 384),
    ):
        check_products(
            layers=layers,
            hidden_size=hidden,
            vocab_size=256_000,
            query_size=queries,
            key_value_size=queries,
            widths=(width,),
            experts=experts,
            sparse_layers=layers,
            expert_width=2048,
            context=10_000_000,
            head_dim=128,
        )
