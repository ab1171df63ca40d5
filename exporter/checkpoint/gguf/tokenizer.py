"""The tokenizer and chat template of a GGUF file, as the text files that a bundle carries.

Source: the GGUF specification's `tokenizer.ggml.*` keys.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TokenizerFiles
from qwen_aot.exporter.checkpoint.bpe import PRE_TYPES, byte_level_bpe
from qwen_aot.exporter.checkpoint.gguf.config import stop_ids, token_id
from qwen_aot.exporter.checkpoint.hf.tokenizer import GENERATION_CONFIG_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from qwen_aot.exporter.checkpoint.tokenizer_checks import check_ids, check_template

logger = logging.getLogger(__name__)

_NAMED_TEMPLATE = "tokenizer.chat_template."
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def tokenizer_files(metadata: Mapping[str, Any], *, vocab_size: int) -> TokenizerFiles:
    """tokenizer.json, tokenizer_config.json and generation_config.json; empty without a tokenizer.

    Args:
        metadata: of the file.
        vocab_size: rows of its embedding.

    Raises:
        CheckpointError: the tokenizer is of a kind that is not supported, damaged, or has an id that the model lacks.
    """
    if "tokenizer.ggml.model" not in metadata:
        return TokenizerFiles()
    model = metadata["tokenizer.ggml.model"]
    if model != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model is {model!r}; not supported; accepted: 'gpt2' (byte-level BPE)")
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    merges = [merge.split(" ") for merge in _list(metadata, "tokenizer.ggml.merges", str)]
    types = _list(metadata, "tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.tokens names {len(tokens) - len(vocab)} tokens twice")
    added = {
        index: AddedToken(tokens[index], normalized=False, special=kind == _CONTROL)
        for index, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    }
    named = _named_tokens(metadata, tokens)
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", False)) and "bos_token" in named
    try:
        tokenizer = byte_level_bpe(
            vocab,
            [(left, right) for left, right in merges],
            pre=_pre_type(metadata),
            added=added,
            bos=named["bos_token"] if adds_bos else None,
        )
    except ValueError as error:
        raise CheckpointError(f"the GGUF tokenizer's tokens and merges don't fit together ({error})") from error
    check_ids(tokenizer, vocab_size, "tokenizer.ggml.tokens")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        **named,
    }
    config["clean_up_tokenization_spaces"] = False
    template = _templates(metadata)
    if template is not None:
        config["chat_template"] = template
        check_template(template, "the GGUF metadata")
    generation = {
        "bos_token_id": token_id(metadata, "bos"),
        "eos_token_id": list(stop_ids(metadata)),
        "pad_token_id": token_id(metadata, "padding"),
    }
    return TokenizerFiles(
        {
            TOKENIZER_NAME: tokenizer.to_str(),
            TOKENIZER_CONFIG_NAME: json.dumps(config, ensure_ascii=False, indent=2),
            GENERATION_CONFIG_NAME: json.dumps({k: v for k, v in generation.items() if v is not None}, indent=2),
        },
        end_tokens=tuple(named[name] for name in ("eos_token",) if name in named),
    )


def _templates(metadata: Mapping[str, Any]) -> Any:
    """The chat template, or where there are more the named ones as in tokenizer_config.json; None: there is none."""
    default = metadata.get("tokenizer.chat_template")
    others = {
        key.removeprefix(_NAMED_TEMPLATE): value for key, value in metadata.items() if key.startswith(_NAMED_TEMPLATE)
    }
    if not others:
        return default
    named = others if default is None else {"default": default, **others}
    return [{"name": name, "template": template} for name, template in named.items()]


def _pre_type(metadata: Mapping[str, Any]) -> str:
    """How text is cut before merging; files older than the key are Qwen's when the architecture is."""
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None and str(metadata.get("general.architecture", "")).startswith("qwen"):
        logger.info("the GGUF file doesn't name its pre-tokenizer; using qwen2, as every Qwen model does")
        return "qwen2"
    if pre not in PRE_TYPES:
        raise CheckpointError(f"tokenizer.ggml.pre is {pre!r}; not supported; accepted: {', '.join(PRE_TYPES)}")
    return str(pre)


def _named_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name, kind in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("sep_token", "seperator"),  # as GGUF spells it
        ("pad_token", "padding"),
        ("cls_token", "cls"),
        ("mask_token", "mask"),
    ):
        index = token_id(metadata, kind)
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise CheckpointError(f"tokenizer.ggml.{kind}_token_id is {index}; accepted: 0 to {len(tokens) - 1}")
        named[name] = tokens[index]
    return named


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        raise CheckpointError(f"{key} is missing or not a list of {kind.__name__}; convert the model again")
    return value
