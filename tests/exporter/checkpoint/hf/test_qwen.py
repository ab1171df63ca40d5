"""First-generation Qwen folders: both spellings of config.json, what it may say, and where each tensor goes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf import config_keys, qwen_keys
from qwen_aot.exporter.checkpoint.hf.config import parse
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import tensor_shapes
from qwen_aot.exporter.weights.sources import check_headers
from tests.first_qwen import (
    CONFIG,
    HEADS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    SEQ_LENGTH,
    VOCAB,
    WIDTH,
    make_weights,
    older_config,
    save_folder,
)
from tests.quantized_files import gptq, gptq_config, random_codes

# What modeling_qwen.py of Qwen-7B-Chat (November 2023) and ModelScope 1.40's backbone.py ask of their configuration.
ASKED = {
    *("apply_residual_connection_post_layernorm", "attn_dropout_prob", "attn_pdrop", "bf16", "embd_pdrop"),
    *("emb_dropout_prob", "ffn_hidden_size", "fp16", "fp32", "hidden_size", "initializer_range", "intermediate_size"),
    *("kv_channels", "layer_norm_epsilon", "max_position_embeddings", "n_embd", "n_layer", "no_bias"),
    *("num_attention_heads", "num_hidden_layers", "onnx_safe", "output_attentions", "output_hidden_states"),
    *("padded_vocab_size", "params_dtype", "pos_emb", "resid_pdrop", "rotary_emb_base", "rotary_pct"),
    *("seq_length", "softmax_in_fp32", "use_cache", "use_cache_kernel", "use_cache_quantization", "use_dynamic_ntk"),
    *("use_flash_attn", "use_logn_attn", "visual", "vocab_size", "tie_word_embeddings", "pruned_heads"),
}


def config(**changed: Any) -> dict[str, Any]:
    return {**CONFIG, **changed}


def test_what_the_published_code_asks_for_has_a_place():
    placed = qwen_keys.READ | qwen_keys.HARMLESS | qwen_keys.ACCEPTED.keys()
    assert sorted(ASKED - placed) == []
    assert sorted(set(CONFIG) - placed) == []


def test_a_key_has_one_place():
    reasons = [*qwen_keys.HARMLESS_BY_REASON.values(), *config_keys.HARMLESS_BY_REASON.values()]
    places = [qwen_keys.READ, qwen_keys.ACCEPTED.keys(), *reasons]
    counts = {key: sum(key in place for place in places) for place in places for key in place}
    assert {key for key, count in counts.items() if count != 1} == set()


@pytest.mark.parametrize("raw", [CONFIG, older_config()], ids=["newer", "older"])
def test_both_spellings_say_the_same(raw):
    found = parse(raw)
    assert (found.model_type, found.vocab_size, found.hidden_size) == ("qwen", VOCAB, HIDDEN)
    assert (found.num_hidden_layers, found.num_attention_heads, found.num_key_value_heads) == (LAYERS, HEADS, HEADS)
    assert (found.head_dim, found.intermediate_size) == (HIDDEN // HEADS, WIDTH)
    assert (found.max_position_embeddings, found.rms_norm_eps, found.rope_theta) == (POSITIONS, 1e-6, 10000)
    assert (found.logn_attn_length, found.dynamic_ntk_length) == (SEQ_LENGTH, SEQ_LENGTH)
    assert found.attention_bias and not found.tie_word_embeddings and found.moe is None


def test_what_is_left_out_means_what_each_configuration_class_says():
    """configuration_qwen.py of the models, and ModelScope's older one."""
    optional = ("layer_norm_epsilon", "use_logn_attn", "use_dynamic_ntk", "rotary_emb_base", "seq_length")
    newer = parse({key: value for key, value in CONFIG.items() if key not in optional})
    assert (newer.rms_norm_eps, newer.rope_theta, newer.logn_attn_length) == (1e-6, 10000, 8192)
    assert newer.dynamic_ntk_length == 8192
    older = parse({key: value for key, value in older_config().items() if key not in optional})
    assert (older.rms_norm_eps, older.logn_attn_length, older.dynamic_ntk_length) == (1e-5, None, None)


def test_a_padded_vocabulary_stands_above_one_that_is_not():
    assert parse({**older_config(), "vocab_size": VOCAB - 61}).vocab_size == VOCAB
    assert parse(config(vocab_size=300)).vocab_size == 300


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5; not supported; accepted: 1"),
        ({"no_bias": False}, "no_bias is false; not supported; accepted: true"),
        ({"use_cache_quantization": True}, "use_cache_quantization is true"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is true"),
        ({"pos_emb": "alibi"}, 'pos_emb is "alibi"; not supported; accepted: "rotary"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*; accepted: null"),
        ({"intermediate_size": 193}, "intermediate_size is 193; accepted: even numbers"),
        ({"kv_channels": 128}, "kv_channels is 128 and num_attention_heads 4; their product must be hidden_size"),
        ({"kv_channels": None}, "kv_channels is None; accepted: a whole number"),
        ({"n_embd": 65}, "hidden_size is 64 and n_embd is 65, which are one"),
        ({"architectures": ["QWenForSequenceClassification"]}, "accepted: QWenLMHeadModel"),
        ({"architectures": "QWenLMHeadModel"}, "accepted: a list of names"),
        ({"use_dynamic_ntk": "yes"}, "use_dynamic_ntk is 'yes'; accepted: true or false"),
        ({"seq_length": 0}, "_length is 0; accepted: whole numbers from"),
        ({"num_attention_heads": 32, "kv_channels": 2}, "head_dim is 2; dynamic NTK"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"model_type": "Qwen"}, "model_type is 'Qwen'; accepted: qwen, qwen2"),
    ],
)
def test_what_would_compute_something_else_is_refused(changed, message):
    with pytest.raises(CheckpointError, match=message):
        parse(config(**changed))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])
def test_what_is_missing_is_named(key):
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        parse({name: value for name, value in CONFIG.items() if name != key})


def test_code_of_a_checkpoint_is_named_and_never_run(caplog, tmp_path):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass QWenConfig: ...\nclass QWenLMHeadModel: ...\n"
    files = dict.fromkeys(("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"), code)
    with caplog.at_level(logging.WARNING), open_checkpoint(save_folder(tmp_path / "it", files=files)):
        pass
    assert "auto_map), which is never run" in caplog.text
    assert not marker.exists()


def test_an_unknown_key_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        parse(config(n_experts=3))
    assert "not known here and are ignored: n_experts" in caplog.text


def test_every_tensor_has_its_place(tmp_path):
    weights = make_weights()
    with open_checkpoint(save_folder(tmp_path, weights)) as checkpoint:
        check_headers(checkpoint)
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == tensor_shapes(checkpoint.config)
        layer = "model.layers.1."
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = slice(part * HIDDEN, (part + 1) * HIDDEN)
            for last in ("weight", "bias"):
                wanted = weights[f"transformer.h.1.attn.c_attn.{last}"][rows]
                np.testing.assert_array_equal(checkpoint.read(f"{layer}self_attn.{name}.{last}"), wanted)
            some = checkpoint.read(f"{layer}self_attn.{name}.weight", slice(3, 7))
            np.testing.assert_array_equal(some, weights["transformer.h.1.attn.c_attn.weight"][rows][3:7])
        for ours, theirs in (
            ("self_attn.o_proj", "attn.c_proj"),
            ("mlp.gate_proj", "mlp.w2"),
            ("mlp.up_proj", "mlp.w1"),
            ("mlp.down_proj", "mlp.c_proj"),
            ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"),
        ):
            np.testing.assert_array_equal(
                checkpoint.read(f"{layer}{ours}.weight"), weights[f"transformer.h.1.{theirs}.weight"]
            )


def test_nothing_of_the_fused_tensor_is_copied(tmp_path):
    with open_checkpoint(save_folder(tmp_path)) as checkpoint:
        for part in "qkv":
            info = checkpoint.tensors[f"model.layers.0.self_attn.{part}_proj.weight"]
            assert info.span is not None
            content = info.span.path.read_bytes()[info.span.offset : info.span.offset + info.span.length]
            assert content == checkpoint.read(info.name).tobytes()


def test_names_that_a_framework_wrapped(tmp_path):
    wrapped = {f"module.{name}": value for name, value in make_weights().items()}
    with open_checkpoint(save_folder(tmp_path / "a", wrapped)) as checkpoint:
        check_headers(checkpoint)


def test_a_buffer_of_frequencies_is_left_out(tmp_path):
    frequencies = np.ones(HIDDEN // HEADS // 2, np.float32)
    weights = {**make_weights(), "transformer.rotary_emb.inv_freq": frequencies}
    with open_checkpoint(save_folder(tmp_path, weights)) as checkpoint:
        check_headers(checkpoint)


@pytest.mark.parametrize("name", ["attn.c_attn.weight", "attn.c_attn.bias"])
def test_a_fused_tensor_of_another_size_is_named(name, tmp_path):
    weights = make_weights()
    full = f"transformer.h.1.{name}"
    weights[full] = weights[full][:-1]
    with pytest.raises(CheckpointError, match=rf"tensor {full} has shape \[191.*\]; accepted: \[192"):
        open_checkpoint(save_folder(tmp_path, weights))


def test_a_tensor_under_transformers_name_is_another_architectures(tmp_path):
    weights = {**make_weights(), "model.norm.weight": np.ones(HIDDEN, np.float32)}
    with pytest.raises(CheckpointError, match="is called as in a qwen2 checkpoint"):
        open_checkpoint(save_folder(tmp_path, weights))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gptq_folder_gives_queries_keys_and_values_apart(bits, symmetric, tmp_path: Path):
    """The published Int4 and Int8 folders: c_attn is one linear [K / 8, 3 N], and packers add biases of zeros."""
    weights: dict[str, Any] = dict(make_weights())
    codes = {}
    for seed, name in enumerate(("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")):
        for layer in range(LAYERS):
            module = f"transformer.h.{layer}.{name}"
            n, k = weights.pop(f"{module}.weight").shape
            codes[module] = random_codes(n, k, bits=bits, symmetric=symmetric, seed=10 * layer + seed)
            weights |= {f"{module}.{part}": array for part, array in gptq(codes[module]).items()}
            weights.setdefault(f"{module}.bias", np.zeros(n, np.float16))
    quantization = gptq_config(bits=bits, sym=symmetric)
    folder = save_folder(tmp_path, weights, config=config(quantization_config=quantization))
    with open_checkpoint(folder) as checkpoint:
        check_headers(checkpoint)
        total = 0
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            weight = f"model.layers.1.self_attn.{name}.weight"
            wanted = codes["transformer.h.1.attn.c_attn"]
            rows = slice(part * HIDDEN, (part + 1) * HIDDEN)
            np.testing.assert_array_equal(checkpoint.read(weight), wanted.values[rows])
            coded = checkpoint.read_encoded(weight, slice(5, 14))
            np.testing.assert_array_equal(coded.codes, wanted.codes[rows][5:14])
            total += checkpoint.tensors[weight].stored_bytes
        parts = ("qweight", "qzeros", "scales", "g_idx")
        stored = sum(weights[f"transformer.h.1.attn.c_attn.{part}"].nbytes for part in parts)
        assert stored - 3 < total <= stored  # a third each, rounded down


def test_a_fused_linear_of_another_size_is_named(tmp_path):
    weights: dict[str, Any] = dict(make_weights())
    for layer in range(LAYERS):
        module = f"transformer.h.{layer}.attn.c_attn"
        del weights[f"{module}.weight"]
        weights |= {f"{module}.{part}": array for part, array in gptq(random_codes(128, HIDDEN)).items()}
    with pytest.raises(
        CheckpointError, match=r"c_attn.qweight has shape \[8, 128\].*accepted.*\[192, 64\]: \[8, 192\]"
    ):
        open_checkpoint(save_folder(tmp_path, weights, config=config(quantization_config=gptq_config())))


def test_ids_of_generation_config():
    generation = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 24000}
    found = parse(config(vocab_size=151936), generation)
    assert (found.eos_token_ids, found.pad_token_id) == ((151643,), 151643)
