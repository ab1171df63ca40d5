"""The tokenizer of a Hugging Face folder, as the text files that a bundle carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TokenizerFiles
from qwen_aot.exporter.checkpoint.bpe import byte_level_bpe
from qwen_aot.exporter.checkpoint.hf.config import read_json
from qwen_aot.exporter.checkpoint.tokenizer_checks import check_generation, check_ids, check_template, json_text

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"  # where transformers 5 saves the template


def read_tokenizer_files(folder: Path, *, vocab_size: int) -> TokenizerFiles:
    """tokenizer.json, tokenizer_config.json with the chat template folded in, generation_config.json.

    A folder with only vocab.json and merges.txt gets a tokenizer.json made of them, cut as Qwen cuts text.
    Without either, the result has no tokenizer.json.

    Args:
        folder: of the checkpoint.
        vocab_size: the model's; often larger than the tokenizer's, being padded.

    Raises:
        CheckpointError: a file is there and a bundle with it wouldn't open: it can't be read, a value is of the
            wrong type, or the tokenizer has an id that the model lacks.
    """
    files: dict[str, str] = {}
    config_path = folder / TOKENIZER_CONFIG_NAME
    config = read_json(config_path) if config_path.is_file() else {}
    if (folder / TOKENIZER_NAME).is_file():
        files[TOKENIZER_NAME] = _read_tokenizer(folder / TOKENIZER_NAME, vocab_size)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        files[TOKENIZER_NAME] = _from_vocab_and_merges(folder, config, vocab_size)
    template_path = folder / CHAT_TEMPLATE_NAME
    if template_path.is_file():
        config["chat_template"] = _read_text(template_path)
    if config:
        check_template(config.get("chat_template"), str(config_path))
        files[TOKENIZER_CONFIG_NAME] = json_text(config, str(config_path))
    generation_path = folder / GENERATION_CONFIG_NAME
    if generation_path.is_file():
        generation = read_json(generation_path)
        check_generation(generation, str(generation_path))
        files[GENERATION_CONFIG_NAME] = json_text(generation, str(generation_path))
    return TokenizerFiles(files)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}); download it again") from error


def _read_tokenizer(path: Path, vocab_size: int) -> str:
    text = _read_text(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for every defect of the file
        raise CheckpointError(f"{path} is not a tokenizer that can be loaded ({error}); download it again") from error
    check_ids(tokenizer, vocab_size, str(path))
    return text


def _from_vocab_and_merges(folder: Path, config: dict[str, Any], vocab_size: int) -> str:
    vocab = read_json(folder / "vocab.json")
    lines = _read_text(folder / "merges.txt").splitlines()
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    for merge in merges:
        if len(merge) != 2:
            raise CheckpointError(f"{folder / 'merges.txt'} has the line {' '.join(merge)!r}; accepted: two tokens")
    added = _added_tokens(folder, config)
    try:
        tokenizer = byte_level_bpe(vocab, [(left, right) for left, right in merges], pre="qwen2", added=added)
    except ValueError as error:
        raise CheckpointError(f"{folder}: vocab.json and merges.txt don't fit together ({error})") from error
    check_ids(tokenizer, vocab_size, f"{folder / 'vocab.json'} (with the added tokens)")
    return tokenizer.to_str()


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, tokenizers.AddedToken]:
    """Tokens beyond the vocabulary, by id: from tokenizer_config.json, else from added_tokens.json."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        try:
            return {
                int(token_id): tokenizers.AddedToken(
                    entry["content"],
                    single_word=entry.get("single_word", False),
                    lstrip=entry.get("lstrip", False),
                    rstrip=entry.get("rstrip", False),
                    normalized=entry.get("normalized", False),
                    special=entry.get("special", False),
                )
                for token_id, entry in decoder.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / TOKENIZER_CONFIG_NAME}: added_tokens_decoder is damaged ({error!r}); "
                "accepted: id -> {content, special, ...}"
            ) from error
    path = folder / "added_tokens.json"
    entries = read_json(path) if path.is_file() else {}
    return {
        token_id: tokenizers.AddedToken(token, normalized=False, special=True) for token, token_id in entries.items()
    }
