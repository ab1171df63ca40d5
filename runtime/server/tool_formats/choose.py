"""Which tool format a model's chat template teaches."""

from __future__ import annotations

from collections.abc import Collection

from qwen_aot.runtime.server.tool_formats.base import ToolFormat
from qwen_aot.runtime.server.tool_formats.tagged_json import TaggedJson

__all__ = ["choose_format"]

FORMATS: tuple[ToolFormat, ...] = (TaggedJson(),)


def choose_format(template_literals: Collection[str]) -> ToolFormat | None:
    """The first of `FORMATS` that fits; None: none does."""
    return next((each for each in FORMATS if each.fits(template_literals)), None)
