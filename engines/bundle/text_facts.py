"""What a bundle's text side will do, found out before anything is built: where answers end, what chats won't work."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle import stop_ids, template_checks
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.runtime.bundle.strict_json import parse_object
from qwen_aot.runtime.text.chat_template import template_tokens
from qwen_aot.runtime.text.tokenizer import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What the manifest and the report say of text.

    Attributes:
        eos_token_ids: at which an answer ends.
        warnings: also in the log.
    """

    eos_token_ids: tuple[int, ...]
    warnings: tuple[str, ...]


def text_facts(checkpoint: Checkpoint) -> TextFacts:
    """Loads the tokenizer as the runtime will, renders its chat template, and gathers the ids that end an answer.

    Raises:
        CheckpointError: the chat template can't be parsed.
        BundleError: a bundle with these files wouldn't open.
    """
    config = checkpoint.config
    files = checkpoint.tokenizer.files
    if TOKENIZER_NAME not in files:
        found = stop_ids.gather(config.eos_token_ids, vocab_size=config.vocab_size, tokenizer=None)
        no_tokenizer = (
            f"{checkpoint.name} has no {TOKENIZER_NAME}: the bundle takes and gives token ids only; put the tokenizer "
            "beside the weights and build again to talk in text"
        )
        return _told((no_tokenizer,), found)
    document = parse_object(files.get(TOKENIZER_CONFIG_NAME, "{}"), TOKENIZER_CONFIG_NAME, is_from_checkpoint=True)
    backend = RustTokenizer.from_str(files[TOKENIZER_NAME])
    tokenizer = Tokenizer(backend, document, vocab_size=config.vocab_size)
    tokens = template_tokens(document)
    template = None
    if tokenizer.chat_template is not None:
        template = template_checks.check_template(tokenizer.chat_template, tokens)
    warnings = template_checks.check_others(document.get("chat_template"), tokens)
    found = stop_ids.gather(
        config.eos_token_ids,
        vocab_size=config.vocab_size,
        tokenizer=backend,
        end_tokens=checkpoint.tokenizer.end_tokens,
        tails=() if template is None else template.tails,
    )
    return _told((*warnings, *(() if template is None else template.warnings)), found)


def _told(warnings: tuple[str, ...], found: stop_ids.StopIds) -> TextFacts:
    every = (*warnings, *found.warnings)
    for warning in every:
        logger.warning("%s", warning)
    return TextFacts(found.ids, every)
