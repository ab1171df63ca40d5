"""Thoughts as the API tells them, `reasoning_content`: without the line ends beside their marks."""

from __future__ import annotations

from qwen_aot.runtime.generation.request import Completion, TokenEvent
from qwen_aot.runtime.text.thoughts import Part

__all__ = ["ThoughtSplitter", "answer_of", "reasoning_of"]

# Chat templates put one behind `<think>`, one before `</think>` and two behind it, and strip those of earlier messages.
_LINE_END = "\n"


def reasoning_of(completion: Completion) -> str:
    """The whole thought; "": there is none, or an empty one."""
    return completion.thought.strip(_LINE_END)


def answer_of(completion: Completion) -> str:
    """The whole answer."""
    answer = completion.answer or ""
    return answer.lstrip(_LINE_END) if completion.thought_tokens else answer


class ThoughtSplitter:
    """The same of one choice's events, as they come."""

    def __init__(self) -> None:
        """Starts before the first event."""
        self._has_thought = False
        self._has_answer = False
        self._held: str | None = None  # line ends that come out with what follows; None: nothing of the thought has

    def push(self, event: TokenEvent | Completion) -> tuple[str, str]:
        """Takes an event's text.

        Returns:
            What of the thought, and what of the answer, has become certain.
        """
        if isinstance(event, Completion):
            part, text = event.last_part, event.last_text
        else:
            part, text = event.part, event.text
        if part is not Part.ANSWER:
            self._has_thought = True
            if part is Part.MARK and isinstance(event, TokenEvent):
                text = text[: event.cut]
            return self._trimmed(text), ""
        if self._has_thought and not self._has_answer:
            text = text.lstrip(_LINE_END)
        self._has_answer = self._has_answer or bool(text)
        return "", text

    def _trimmed(self, text: str) -> str:
        """What of a thought's text may be given out: line ends only between others."""
        if self._held is None:
            text = text.lstrip(_LINE_END)
            if not text:
                return ""
        whole = (self._held or "") + text
        certain = whole.rstrip(_LINE_END)
        self._held = whole[len(certain) :]
        return certain
