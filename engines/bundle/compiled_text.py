"""Text compiled ahead of time: files for a runtime without JSON vocabularies, regular expressions and Jinja.

What can't be compiled is a warning: the bundle is built without that file, and a reader that needs it says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle.compiled_chat import COMPILED_CHAT_NAME, ChatNotCompiledError, compile_chat
from qwen_aot.engines.bundle.compiled_tokenizer import (
    COMPILED_TOKENIZER_NAME,
    TokenizerNotCompiledError,
    compile_tokenizer,
)
from qwen_aot.runtime.bundle.strict_json import parse_object
from qwen_aot.runtime.text.tokenizer import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, Tokenizer

__all__ = ["COMPILED_CHAT_NAME", "COMPILED_TOKENIZER_NAME", "CompiledText", "compile_text"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CompiledText:
    """What was compiled.

    Attributes:
        files: (name, content) of each.
        warnings: of what wasn't; also in the log.
    """

    files: tuple[tuple[str, bytes], ...] = ()
    warnings: tuple[str, ...] = ()


def compile_text(files: Mapping[str, str], *, vocab_size: int) -> CompiledText:
    """Compiles a checkpoint's tokenizer and chat template.

    Args:
        files: the checkpoint's text files, in which `text_facts` found nothing wrong.
        vocab_size: the model's.
    """
    if TOKENIZER_NAME not in files:
        return CompiledText()
    found = _compiled(files[TOKENIZER_NAME], files.get(TOKENIZER_CONFIG_NAME, "{}"), vocab_size)
    for warning in found.warnings:
        logger.warning("%s", warning)
    return found


@functools.lru_cache(maxsize=4)  # a build and its verification, builds in several precisions
def _compiled(tokenizer_json: str, config_json: str, vocab_size: int) -> CompiledText:
    config = parse_object(config_json, TOKENIZER_CONFIG_NAME, is_from_checkpoint=True)
    tokenizer = Tokenizer(RustTokenizer.from_str(tokenizer_json), config, vocab_size=vocab_size)
    files: list[tuple[str, bytes]] = []
    warnings: list[str] = []
    try:
        files.append((COMPILED_TOKENIZER_NAME, compile_tokenizer(tokenizer_json, vocab_size=vocab_size)))
    except TokenizerNotCompiledError as error:
        warnings.append(
            f"the tokenizer isn't compiled: {error}; the bundle has no {COMPILED_TOKENIZER_NAME}, so that the C "
            "library takes and gives token ids only; the Python runtime reads tokenizer.json"
        )
    if tokenizer.chat_template is not None:
        try:
            files.append((COMPILED_CHAT_NAME, compile_chat(tokenizer)))
        except ChatNotCompiledError as error:
            warnings.append(
                f"the chat template isn't compiled: {error}; the bundle has no {COMPILED_CHAT_NAME}, so that the C "
                "library renders no chats; the Python runtime renders them"
            )
    return CompiledText(tuple(files), tuple(warnings))
