"""How an image stands among a prompt's tokens: between two tokens of its own, as many more as it has rows.

The published model writes the bytes of the image's address in the place of the rows and fills up with `<imgpad>`; its
decoder replaces what stands there before it reads it, so that the pads alone are the same prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["ImageTokens"]

_NAMES = ("<img>", "<imgpad>", "</img>")


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The ids that begin an image, stand for its rows, and end it."""

    start: int
    pad: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> ImageTokens:
        """Those of a bundle's tokenizer.

        Raises:
            GenerationError: it lacks one, or there is no tokenizer.
        """
        found = [None if tokenizer is None else tokenizer.backend.token_to_id(name) for name in _NAMES]
        start, pad, end = found
        if start is None or pad is None or end is None:
            lacking = [name for name, token_id in zip(_NAMES, found, strict=True) if token_id is None]
            raise GenerationError(
                f"the bundle's tokenizer lacks {', '.join(lacking)}, so no image can stand in a prompt: rebuild it "
                "from a checkpoint of Qwen-VL with its tokenizer"
            )
        return cls(start, pad, end)

    def span(self, rows: int) -> list[int]:
        """The tokens of an image of so many rows, which begin one behind the first."""
        return [self.start, *[self.pad] * rows, self.end]


def picture_label(number: int) -> str:
    """What stands before the tokens of a message's pictures, from 1 on; behind them stands a new line."""
    return f"Picture {number}: "
