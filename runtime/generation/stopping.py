"""What ends a request: ids, and stop strings, found across pieces of streamed text and never given out in part."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["StopMatcher", "ending_ids"]


def ending_ids(config: GenerationConfig, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The ids that end a request with complete settings.

    A stop string that spells a special token stands for its id: special tokens have no text in which it could be found.
    """
    assert config.stop is not None and config.eos_token_ids is not None
    special = [tokenizer.special_id(stop) for stop in config.stop] if tokenizer else []
    return frozenset(
        [
            *config.stop_token_ids,
            *(() if config.ignore_eos else config.eos_token_ids),
            *(token_id for token_id in special if token_id is not None),
        ]
    )


class StopMatcher:
    """Passes text through until a stop string is complete; the result doesn't depend on how text is cut.

    The string that is complete first wins; of two complete at once, the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Takes new text.

        Args:
            text: what follows.
            may_stop: False: a stop string that this text completes ends nothing, and is text.

        Returns:
            The text that may be given out, and whether a stop string ended it. What could be the start of a
            stop string is held back.
        """
        if not self._stops:
            return text, False
        held = len(self._held)
        text = self._held + text
        # Only what the new text completes: what is held may have one in it that was not to stop.
        found = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := text.find(stop, max(0, held - len(stop) + 1))) >= 0
        ]
        if found and may_stop:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, once it's known that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
