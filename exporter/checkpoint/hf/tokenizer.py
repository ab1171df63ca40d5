"""The tokenizer of a Hugging Face folder, as the text files that a bundle carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from qwen_aot.errors import CheckpointError, is_panic
from qwen_aot.exporter.checkpoint.base import TokenizerFiles
from qwen_aot.exporter.checkpoint.bpe import byte_level_bpe
from qwen_aot.exporter.checkpoint.hf import chat_format, tiktoken_file
from qwen_aot.exporter.checkpoint.hf.config import read_json
from qwen_aot.exporter.checkpoint.hf.special_tokens import end_tokens, folded, special_tokens, with_added
from qwen_aot.exporter.checkpoint.hf.template_files import read_templates
from qwen_aot.exporter.checkpoint.text_files import read_text
from qwen_aot.exporter.checkpoint.tokenizer_checks import check_generation, check_ids, check_template, json_text

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
SPECIAL_TOKENS_MAP_NAME = "special_tokens_map.json"
ADDED_TOKENS_NAME = "added_tokens.json"


def read_tokenizer_files(folder: Path, *, vocab_size: int, takes_images: bool = False) -> TokenizerFiles:
    """tokenizer.json, tokenizer_config.json, generation_config.json.

    Into tokenizer_config.json go the chat template and the special tokens that transformers takes from other files,
    into tokenizer.json the added tokens that only another file has. A folder with only vocab.json and merges.txt, or
    with only qwen.tiktoken, gets a tokenizer.json made of them, cut as Qwen cuts text. Without any, the result has no
    tokenizer.json. Where no file has a template, `chat_format` of generation_config.json says which it is.

    Args:
        folder: of the checkpoint.
        vocab_size: the model's; often larger than the tokenizer's, being padded.
        takes_images: see `tiktoken_file.read_tiktoken`.

    Raises:
        CheckpointError: a file is there and a bundle with it wouldn't open: it can't be read, a value is of the
            wrong type, or the tokenizer has an id that the model lacks; or two files give a token different ids.
    """
    files: dict[str, str] = {}
    config_path = folder / TOKENIZER_CONFIG_NAME
    config = _read_optional(config_path)
    special_map = _read_optional(folder / SPECIAL_TOKENS_MAP_NAME)
    tokenizer = None
    if (folder / TOKENIZER_NAME).is_file():
        added = _added_tokens(folder, config, special_map)
        files[TOKENIZER_NAME], tokenizer = _read_tokenizer(folder, added, vocab_size)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        tokenizer = _from_vocab_and_merges(folder, _added_tokens(folder, config, special_map), vocab_size)
        files[TOKENIZER_NAME] = tokenizer.to_str()
    elif (folder / tiktoken_file.NAME).is_file():
        tokenizer = tiktoken_file.read_tiktoken(folder / tiktoken_file.NAME, takes_images=takes_images)
        check_ids(tokenizer, vocab_size, str(folder / tiktoken_file.NAME))
        files[TOKENIZER_NAME] = tokenizer.to_str()
        # Of what is made of it no code is the class.
        config = {key: value for key, value in config.items() if key != "auto_map"}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    generation_path = folder / GENERATION_CONFIG_NAME
    generation = _read_optional(generation_path)
    chat = chat_format.read(generation, str(generation_path))
    template = read_templates(folder, config.get("chat_template"))
    if template is None:
        template = chat.template
    if template is not None:
        config["chat_template"] = template
    ends: tuple[str, ...] = ()
    if tokenizer is not None:
        named = folded(config, special_map, tokenizer.get_vocab(with_added_tokens=True))
        ends = (*end_tokens(named, config, special_map), *chat.end_tokens)
        config = named
    if config:
        check_template(config.get("chat_template"), str(config_path))
        files[TOKENIZER_CONFIG_NAME] = json_text(config, str(config_path))
    if generation_path.is_file():
        check_generation(generation, str(generation_path))
        files[GENERATION_CONFIG_NAME] = json_text(generation, str(generation_path))
    return TokenizerFiles(files, ends)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_tokenizer(
    folder: Path, added: dict[int, tokenizers.AddedToken], vocab_size: int
) -> tuple[str, tokenizers.Tokenizer]:
    path = folder / TOKENIZER_NAME
    text = read_text(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises plain Exception for defects of the file, and panics at some
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise CheckpointError(f"{path} is not a tokenizer that can be loaded ({error}); download it again") from error
    has_more = with_added(tokenizer, added, str(path), f"{TOKENIZER_CONFIG_NAME} or {ADDED_TOKENS_NAME}")
    check_ids(tokenizer, vocab_size, str(path))
    return tokenizer.to_str() if has_more else text, tokenizer


def _from_vocab_and_merges(
    folder: Path, added: dict[int, tokenizers.AddedToken], vocab_size: int
) -> tokenizers.Tokenizer:
    vocab = read_json(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    for merge in merges:
        if len(merge) != 2:
            raise CheckpointError(f"{folder / 'merges.txt'} has the line {' '.join(merge)!r}; accepted: two tokens")
    try:
        tokenizer = byte_level_bpe(vocab, [(left, right) for left, right in merges], pre="qwen2", added=added)
    except ValueError as error:
        raise CheckpointError(f"{folder}: vocab.json and merges.txt don't fit together ({error})") from error
    check_ids(tokenizer, vocab_size, f"{folder / 'vocab.json'} (with the added tokens)")
    return tokenizer


def _added_tokens(
    folder: Path, config: dict[str, Any], special_map: dict[str, Any]
) -> dict[int, tokenizers.AddedToken]:
    """Tokens beyond the vocabulary, by id: from tokenizer_config.json, else from added_tokens.json.

    The latter doesn't say which are special: those that another file names so, and all where none names any.
    """
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
    entries = _read_optional(folder / ADDED_TOKENS_NAME)
    if not all(type(token_id) is int and token_id >= 0 for token_id in entries.values()):
        raise CheckpointError(f"{folder / ADDED_TOKENS_NAME} is damaged; accepted: token -> id")
    special = special_tokens(config, special_map) or set(entries)
    return {
        token_id: tokenizers.AddedToken(token, normalized=token not in special, special=token in special)
        for token, token_id in entries.items()
    }
