"""The chat format that a first-generation Qwen's generation_config.json names, as a template and tokens that end turns.

Source: `make_context` and `get_stop_words_ids` of qwen_generation_utils.py as published with the models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

# What `make_context` writes: turns behind each other, a system turn first, which `chat` makes up where none is given.
_CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How a model is talked to.

    Attributes:
        template: None: it isn't, or another file says how.
        end_tokens: that end its answers.
    """

    template: str | None = None
    end_tokens: tuple[str, ...] = ()


_FORMATS: Mapping[str, ChatFormat] = {
    "chatml": ChatFormat(_CHATML, ("<|im_end|>", "<|im_start|>")),
    "raw": ChatFormat(),  # of base models
}


def read(generation: Mapping[str, Any], where: str) -> ChatFormat:
    """The format that a parsed generation_config.json names; a warning where there is no such one."""
    name = generation.get("chat_format")
    if name is None:
        return ChatFormat()
    if not isinstance(name, str) or name not in _FORMATS:
        logger.warning(
            "%s: chat_format is %r, which is not known here: the bundle gets no chat template by it; known: %s",
            where,
            name,
            ", ".join(_FORMATS),
        )
        return ChatFormat()
    return _FORMATS[name]
