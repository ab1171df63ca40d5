"""What is asked of the runtime and what comes back: Request, TokenEvent, Completion."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.constraint import ConstraintSource
from qwen_aot.runtime.generation.images import PlacedImage
from qwen_aot.runtime.generation.sampling import TokenLogprobs
from qwen_aot.runtime.text.thoughts import Part, ThoughtTokens
from qwen_aot.str_enum import StrEnum

__all__ = ["Completion", "Event", "FinishReason", "Request", "Timings", "TokenEvent"]


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop id or a stop string
    LENGTH = "length"  # max_new_tokens, or the context is full
    CANCELLED = "cancelled"
    ERROR = "error"  # its step failed; `Completion.error` says how


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to go on from it.

    Attributes:
        prompt: text, or token ids.
        config: see `GenerationDefaults.resolve`; None: the bundle's defaults.
        cancel: set it, from any thread, to end the request at the next step.
        keep_cache: start from what the cache of another such request holds of this prompt's beginning, and leave the
            row filled for the next one (a conversation). The reused part may have been computed in other steps, so
            logits can differ from those of a fresh prefill by rounding.
        cache_scope: a number; with `keep_cache`, only requests of the same one start from each other's cache. Whoever
            serves several parties gives each its own: the time that a first token takes tells what the cache held.
        is_chat: the prompt is a conversation's: where nobody says how long an answer may be, it may fill the context.
        constraint: what the text of each choice may be; None: anything. An output ends only where its constraint lets
            it, at once where nothing may follow (before `min_new_tokens` too), or where there is no more room.
        images: that stand among the tokens of a prompt that is given as ids, in their order.
        thoughts: an output may begin with a thought between these tokens, or go on in one that the prompt begins: stop
            strings and the constraint count only behind it, and with a constraint the output doesn't end in it. None:
            all of it is answer.
    """

    prompt: str | Sequence[int]
    config: GenerationConfig | None = None
    cancel: threading.Event | None = None
    keep_cache: bool = False
    cache_scope: int = 0
    is_chat: bool = False
    constraint: ConstraintSource | None = None
    images: tuple[PlacedImage, ...] = ()
    thoughts: ThoughtTokens | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds.

    Attributes:
        prefill: in the request's prefill steps.
        first_token: from the request's arrival to its first token, waiting for a row included.
        decode: from the first token to the last.
    """

    prefill: float
    first_token: float
    decode: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token.

    Attributes:
        index: of the request, in the order given.
        token_id: the token.
        text: what became certain with it: whole characters, and nothing that may belong to a stop string.
        logprobs: if asked for.
        choice: which of the request's outputs it belongs to, 0 to n - 1.
        part: what of the output the token and its text belong to; ANSWER unless the request has `thoughts`.
        cut: leading characters of a closing mark's text that are the thought's: where the mark cuts a character, the
            U+FFFD that stands for it; else 0.
    """

    index: int
    token_id: int
    text: str
    logprobs: TokenLogprobs | None
    choice: int = 0
    part: Part = Part.ANSWER
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A request's end and all of its output; each choice of it has one.

    Attributes:
        index: of the request, in the order given.
        token_ids: generated, without the stop id that ended them; the tokens of a stop string are among them.
        text: their text up to a stop string; None if the bundle has no tokenizer.
        last_text: the end of `text` that no TokenEvent has given out.
        finish_reason: why it ended.
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them that were still in the cache.
        logprobs: one for each token id, if asked for.
        timings: where the time went.
        error: why it failed; None unless `finish_reason` is `error`.
        choice: which of the request's outputs it is, 0 to n - 1.
        prompt_logprobs: one for each token of the prompt, if asked for, the first None; fewer if the request ended
            before its prompt was done. None: not asked for. The same in each choice, as are `cached_tokens` and the
            prefill's time: also in one that ended before it began.
        thought: what of `text` is a thought, without its marks; empty unless the request has `thoughts`.
        thought_characters: the leading ones of `text` that are the thought's, its marks among them.
        thought_tokens: the same of `token_ids`.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str | None
    last_text: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...]
    timings: Timings
    error: GenerationError | None = None
    choice: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    thought: str = ""
    thought_characters: int = 0
    thought_tokens: int = 0

    @property
    def answer(self) -> str | None:
        """`text` without the thought and its marks."""
        return None if self.text is None else self.text[self.thought_characters :]

    @property
    def last_part(self) -> Part:
        """What `last_text` belongs to."""
        is_cut = self.thought_tokens > 0 and self.text is not None and self.thought_characters == len(self.text)
        return Part.THOUGHT if is_cut else Part.ANSWER


Event = TokenEvent | Completion
