"""Which tool format a model is told functions in: its chat template's, a usual one, or one that is named."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_aot.runtime.server.tool_formats.base import ToolFormat
from qwen_aot.runtime.server.tool_formats.hermes import Hermes
from qwen_aot.runtime.server.tool_formats.qwen import Qwen
from qwen_aot.runtime.server.tool_formats.react import React
from qwen_aot.runtime.text.chat_template import ChatTemplate

__all__ = ["FORMATS", "Teaching", "choose_format"]

FORMATS: tuple[ToolFormat, ...] = (Hermes(), Qwen(), React())

# Of templates that take no tools: a text that their source has, and the format of models with such a template. ChatML
# is Qwen1.5's, whose makers recommend that format for it: https://github.com/QwenLM/Qwen-Agent/issues/104.
_USUAL = {"<|im_start|>": "qwen"}


@dataclass(frozen=True, slots=True)
class Teaching:
    """How a model is told functions.

    Attributes:
        format: in which it calls them.
        by_template: the chat template tells it; else they are told as text.
    """

    format: ToolFormat
    by_template: bool


def choose_format(template: ChatTemplate, name: str | None) -> Teaching | None:
    """The format of a model with this chat template.

    Args:
        template: the model's.
        name: of a format, whatever the template teaches; None: the template decides.

    Returns:
        None: the template teaches none that is known, and none is usual for it.
    """
    literals = template.literals
    if template.takes_tools:
        taught = next((each for each in FORMATS if each.fits(literals)), None)
        if taught is not None and name in (None, taught.name):
            return Teaching(taught, by_template=True)
    elif name is None:
        name = next((usual for text, usual in _USUAL.items() if any(text in each for each in literals)), None)
    return next((Teaching(each, by_template=False) for each in FORMATS if each.name == name), None)
