"""Thoughts: what a model says to itself before it answers, and which tokens of an answer they are.

Qwen3, QwQ and what was distilled from DeepSeek-R1 write them between two tokens, `<think>` and `</think>`; some chat
templates write the first of them, or both where no thought is wanted, at the end of the prompt.

Source: the chat templates of https://huggingface.co/Qwen/Qwen3-0.6B and https://huggingface.co/Qwen/QwQ-32B
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_aot.runtime.text.chat_template import ChatTemplate
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["Part", "ThoughtReader", "ThoughtTokens"]

OPENING, CLOSING = "<think>", "</think>"
_END = 16  # tokens of a prompt that are looked at: a mark and the line ends behind it


class Part(enum.Enum):
    """What of an output a token belongs to."""

    ANSWER = "answer"
    THOUGHT = "thought"
    MARK = "mark"  # it begins or ends the thought


class _Stage(enum.Enum):
    """Of one output."""

    BEFORE = enum.auto()  # nothing but whitespace has come: it may begin with a thought
    THOUGHT = enum.auto()
    ANSWER = enum.auto()


@dataclass(frozen=True, slots=True)
class ThoughtTokens:
    """The ids that begin and end a thought."""

    opening: int
    closing: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: ChatTemplate) -> ThoughtTokens | None:
        """Those of a model; None: it has no thoughts that could be told from its answers.

        A model has them whose template knows of `</think>`, and whose tokenizer has both marks as tokens: one that a
        text spells piece by piece is text.
        """
        added = {token.content: token_id for token_id, token in tokenizer.backend.get_added_tokens_decoder().items()}
        if OPENING not in added or CLOSING not in added or not any(CLOSING in text for text in template.literals):
            return None
        return cls(added[OPENING], added[CLOSING])

    def is_open(self, prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
        """Whether a prompt ends with a thought that was begun, so that the model goes on in it."""
        return _ends_with(prompt, self.opening, tokenizer)

    def closed(self, prompt: Sequence[int], tokenizer: Tokenizer) -> list[int]:
        """A prompt behind which an answer goes on: a thought that it begins is ended, as an empty one.

        It is the empty thought that Qwen3's template writes, in the tokens that a tokenizer makes of it: whitespace
        that the prompt has behind its mark is replaced, since line ends of two pieces would be other tokens.
        """
        if not self.is_open(prompt, tokenizer):
            return list(prompt)
        blank = tokenizer.encode("\n\n", add_special_tokens=False)
        return [*prompt[: len(prompt) - prompt[::-1].index(self.opening)], *blank, self.closing, *blank]


class ThoughtReader:
    """Tells the tokens of one output apart, as they come."""

    def __init__(
        self, tokens: ThoughtTokens | None, prompt: Sequence[int] = (), tokenizer: Tokenizer | None = None
    ) -> None:
        """Starts before the first token.

        Args:
            tokens: of the model; None: all of the output is answer.
            prompt: the prompt's tokens.
            tokenizer: the model's; goes with `tokens`.
        """
        self._tokens = tokens
        self._blank = ""  # text from before the answer or the thought
        self._stage = _Stage.ANSWER
        if tokens is not None and tokenizer is not None:
            if tokens.is_open(prompt, tokenizer):
                self._stage = _Stage.THOUGHT
            elif not _ends_with(prompt, tokens.closing, tokenizer):
                self._stage = _Stage.BEFORE

    @property
    def is_in_thought(self) -> bool:
        """Whether the next token belongs to a thought, or ends it."""
        return self._stage is _Stage.THOUGHT

    @property
    def may_open(self) -> int | None:
        """The token that would begin a thought; None: none may begin here."""
        return None if self._tokens is None or self._stage is not _Stage.BEFORE else self._tokens.opening

    def ends_thought(self, token_id: int) -> bool:
        """Whether this token, if it came next, would end a thought: what the detokenizer holds is the thought's."""
        return self.is_in_thought and self._tokens is not None and token_id == self._tokens.closing

    def push(self, token_id: int, text: str) -> tuple[str, Part]:
        """Takes the next token.

        Args:
            token_id: its id.
            text: what the detokenizer gave for it.

        Returns:
            Text that has become certain, and what it belongs to.
        """
        part = Part.ANSWER
        if self._stage is _Stage.THOUGHT:
            part = Part.THOUGHT
            if self.ends_thought(token_id):
                part, self._stage = Part.MARK, _Stage.ANSWER
        elif self._stage is _Stage.BEFORE:
            if token_id == self.may_open:
                part, self._stage = Part.MARK, _Stage.THOUGHT
            elif text.isspace():
                self._blank += text
                return "", part
            else:
                self._stage = _Stage.ANSWER
        blank, self._blank = self._blank, ""
        return blank + text, part

    def flush(self, text: str) -> tuple[str, Part]:
        """The same for the detokenizer's rest, once no token follows."""
        blank, self._blank = self._blank, ""
        return blank + text, Part.THOUGHT if self.is_in_thought else Part.ANSWER


def _ends_with(prompt: Sequence[int], mark: int, tokenizer: Tokenizer) -> bool:
    """Whether a mark is the last of a prompt but for whitespace."""
    end = list(prompt[-_END:])
    if mark not in end:
        return False
    behind = end[len(end) - end[::-1].index(mark) :]
    return not tokenizer.backend.decode(behind, skip_special_tokens=False).strip()
