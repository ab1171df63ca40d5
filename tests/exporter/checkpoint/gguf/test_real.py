"""The one trained model that the package index carries: SmolLM2-135M-Instruct, Q4_1."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_aot.exporter.checkpoint.gguf.reader import GgufCheckpoint
from qwen_aot.exporter.model.tensors import num_parameters, tensor_shapes
from tests.gguf_files import smollm2_path
from tests.tools import lacking

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def smollm2() -> GgufCheckpoint:
    path = smollm2_path()
    if path is None:
        lacking("models/ has no SmolLM2 GGUF; scripts/setup.sh fetches it")
    return GgufCheckpoint(path)


@pytest.fixture(scope="module")
def tokenizer(smollm2: GgufCheckpoint) -> Tokenizer:
    return Tokenizer.from_str(smollm2.tokenizer.files["tokenizer.json"])


def test_a_real_file_is_complete(smollm2: GgufCheckpoint) -> None:
    shapes = {name: info.shape for name, info in smollm2.tensors.items()}
    assert shapes == tensor_shapes(smollm2.config)
    assert num_parameters(smollm2.config) == 134_515_008  # as published with SmolLM2-135M
    assert smollm2.config.eos_token_ids == (2,)


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cn", "Co")), max_size=60))
def test_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_and_digits(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>").ids == [0, 1, 2]
    assert tokenizer.encode("20245").tokens == ["2", "0", "2", "4", "5"]
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>").ids) == "a"


@pytest.mark.slow
def test_real_weights_answer_as_the_model_does(smollm2: GgufCheckpoint, tokenizer: Tokenizer) -> None:
    facts = smollm2.config
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=facts.vocab_size,
            hidden_size=facts.hidden_size,
            intermediate_size=facts.intermediate_size,
            num_hidden_layers=facts.num_hidden_layers,
            num_attention_heads=facts.num_attention_heads,
            num_key_value_heads=facts.num_key_value_heads,
            rms_norm_eps=facts.rms_norm_eps,
            rope_theta=facts.rope_theta,
            tie_word_embeddings=facts.tie_word_embeddings,
            eos_token_id=list(facts.eos_token_ids),
            pad_token_id=facts.pad_token_id,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.from_numpy(np.array(smollm2.read(name))))  # torch wants it writable
    assert "<|im_start|>" in json.loads(smollm2.tokenizer.files["tokenizer_config.json"])["chat_template"]
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France? Answer briefly.<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(prompt).ids
    output = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, len(ids) :].tolist()) == "The capital of France is Paris."
