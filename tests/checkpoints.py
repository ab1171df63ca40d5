"""Random tiny checkpoints saved by transformers: the reference that every numeric test compares with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging as transformers_logging

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_TOKENIZER_VOCAB = 256 + len(SPECIAL_TOKENS)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# What `moe=...` is completed with: four experts of which two are used, and a shared one.
MOE_DEFAULTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

# (generation, whether it has experts) -> transformers' classes.
KINDS: Mapping[tuple[str, bool], tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    ("qwen2", False): (Qwen2Config, Qwen2ForCausalLM),
    ("qwen2", True): (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    ("qwen3", False): (Qwen3Config, Qwen3ForCausalLM),
    ("qwen3", True): (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}

# Qwen2's, as its tokenizer.json has it.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital is Paris. "
    "1 2 3 4 5 6 7 8 9 10. Hello, world! Größe, naïve café, 你好，世界。 "
    "def main(): return 0\n\n\tfoo += bar;\n"
)


def tiny_config(
    *,
    heads: int = 4,
    kv_heads: int = 4,
    head_dim: int | None = None,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 131,
    intermediate: int = 96,
    tied: bool = False,
    moe: Mapping[str, Any] | None = None,
    generation: str = "qwen2",
    **overrides: Any,
) -> PretrainedConfig:
    """A small transformers config; `moe={}` makes a mixture of experts with MOE_DEFAULTS (of Qwen3: no shared one)."""
    values: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
    }
    if head_dim is not None:
        values["head_dim"] = head_dim
    elif generation == "qwen3":
        values["head_dim"] = hidden // heads  # its default is 128
    if moe is not None:
        values |= MOE_DEFAULTS
        if generation == "qwen3":
            del values["shared_expert_intermediate_size"]
    kind, _ = KINDS[generation, moe is not None]
    return kind(**(values | dict(moe or {}) | overrides))


def tiny_model(config: PretrainedConfig, *, dtype: str = "float32", seed: int = 0) -> Any:
    """A model in eval mode: every parameter random (biases and norms too), logits with std ~1."""
    kind = next(kind for of, kind in KINDS.values() if of is type(config))
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                values = 1 + 0.2 * values
            elif name.endswith(".bias"):
                values = 0.3 * values
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                # The final norm makes the hidden state's elements ~1, so logits come out ~1.
                values = values * parameter.shape[-1] ** -0.5
            else:
                values = 1.2 * values * parameter.shape[-1] ** -0.5
            parameter.copy_(values)
    return model.to(getattr(torch, dtype))


def save_tiny(
    path: Path,
    *,
    shard_size: int | None = None,
    dtype: str = "float32",
    with_tokenizer: bool = False,
    seed: int = 0,
    **config: Any,
) -> Any:
    """Saves a random tiny model to a folder and returns it in eval mode.

    Args:
        path: the folder to write.
        shard_size: bytes per shard; None for one file.
        dtype: float32, bfloat16 or float16, of the file and of the returned model.
        with_tokenizer: adds a byte-level BPE tokenizer with a ChatML template; vocab must be at least
            MIN_TOKENIZER_VOCAB.
        seed: of the weights.
        config: see `tiny_config` (heads, kv_heads, head_dim, hidden, layers, vocab, tied, moe, ...).
    """
    ids: dict[str, int] = {}
    if with_tokenizer:
        vocab = config.setdefault("vocab", 320)
        ids = save_tokenizer(path, vocab)
        config.setdefault("eos_token_id", ids["<|im_end|>"])
        config.setdefault("bos_token_id", ids["<|endoftext|>"])
    model = tiny_model(tiny_config(**config), dtype=dtype, seed=seed)
    if ids:
        model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    with quiet():
        model.save_pretrained(path, max_shard_size=shard_size if shard_size is not None else "5GB")
    return model


def save_tokenizer(path: Path, vocab: int) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json; returns the special tokens' ids."""
    if vocab < MIN_TOKENIZER_VOCAB:
        raise ValueError(f"vocab is {vocab}; a byte-level tokenizer needs at least {MIN_TOKENIZER_VOCAB}")
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress bar of save_pretrained out of test output."""
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def reference_logits(model: torch.nn.Module, ids: list[list[int]]) -> torch.Tensor:
    """[B, S, V] float32 logits of transformers for token ids of equal length."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor(ids)).logits.float()
    return logits
