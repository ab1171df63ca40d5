"""One output in flight: logits in, events out. Knows no engine and no other request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import ConstraintError, GenerationError
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.constraint import HeldOutput
from qwen_aot.runtime.generation.images import cache_keys
from qwen_aot.runtime.generation.request import Completion, Event, FinishReason, Request, Timings, TokenEvent
from qwen_aot.runtime.generation.sampling import Sampler, TokenLogprobs, log_probabilities
from qwen_aot.runtime.generation.speculation import Drafter
from qwen_aot.runtime.generation.stopping import StopMatcher, ending_ids
from qwen_aot.runtime.text.detokenizer import make_detokenizer
from qwen_aot.runtime.text.thoughts import Part, ThoughtReader
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["ActiveSequence", "PromptWork"]


@dataclass
class PromptWork:
    """What became of a request's prompt; its choices share it, those that never begin too.

    Attributes:
        cached_tokens: leading tokens that the cache already held.
        seconds: spent in the steps that fed it.
        logprobs: one for each token fed so far, the first None.
    """

    cached_tokens: int = 0
    seconds: float = 0.0
    logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])


class ActiveSequence:
    """The state of one output of a request, from its arrival to its completion.

    Attributes:
        index: of the request.
        choice: which of the request's outputs it is.
        request: as given.
        config: its settings, complete.
        prompt_ids: the prompt's tokens.
        cache_keys: what each of them is to the cache (`images.cache_keys`).
        token_ids: generated so far.
        prefilled_tokens: leading tokens of the prompt that are in the row by now.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        config: GenerationConfig,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        choice: int,
        prompt: PromptWork,
    ) -> None:
        """Starts with nothing done; `config` is what `GenerationDefaults.complete` gave, `prompt` the request's."""
        assert config.max_new_tokens is not None and config.stop is not None and config.eos_token_ids is not None
        self.index = index
        self.choice = choice
        self.request = request
        self.config = config
        self.prompt_ids = list(prompt_ids)
        self.cache_keys = cache_keys(self.prompt_ids, request.images)
        self.token_ids: list[int] = []
        self.prefilled_tokens = 0
        self._prompt = prompt
        self._limit = config.max_new_tokens
        self._ending_ids = ending_ids(config, tokenizer)
        self._thoughts = ThoughtReader(request.thoughts, self.prompt_ids, tokenizer)
        self._held: HeldOutput | None = None
        if request.constraint is not None:
            self._held = HeldOutput(request.constraint, self._ending_ids, self._thoughts)
        self._sampler = Sampler(config, self.prompt_ids, self._ending_ids, choice, self._held)
        self._detokenizer = make_detokenizer(tokenizer) if tokenizer else None
        self._stop = StopMatcher(config.stop)
        self._text: list[str] = []
        self._thought: list[str] = []  # what of the text is the thought
        self._thought_characters = self._thought_tokens = 0  # with its marks
        self._answer_has_begun = False  # behind a thought, with other text than line ends
        self._logprobs: list[TokenLogprobs] = []
        self._arrived = time.perf_counter()
        self._first_token: float | None = None
        self._drafter: Drafter | None = None  # once it is asked for a draft

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller has asked for the end."""
        return self.request.cancel is not None and self.request.cancel.is_set()

    @property
    def is_prefilled(self) -> bool:
        """Whether all of the prompt is in the row."""
        return self.prefilled_tokens == len(self.prompt_ids)

    @property
    def is_running(self) -> bool:
        """Whether the next token to feed is known: the prompt's, if each of them is to have its log-probabilities."""
        return self.is_prefilled or (self.has_prompt_logprobs and self.prefilled_tokens > 0)

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether each token of the prompt needs the logits before it, so that they are fed one by one."""
        return self.config.prompt_logprobs is not None

    @property
    def reuses_cache(self) -> bool:
        """Whether the prompt may start from what the cache holds of its beginning; logits of that are gone."""
        return self.request.keep_cache and not self.has_prompt_logprobs

    def begin_cached(self, tokens: int) -> None:
        """Starts from leading tokens of the prompt that the cache holds."""
        self._prompt.cached_tokens = self.prefilled_tokens = tokens

    def note_fed(self, tokens: int, seconds: float) -> None:
        """Counts tokens of the prompt that a step has fed."""
        self.prefilled_tokens += tokens
        self._prompt.seconds += seconds

    def read_prompt(self, logits: NDArray[np.float32]) -> int:
        """Notes the log-probabilities of the prompt's next token from logits [V]; returns it, to be fed."""
        assert self.config.prompt_logprobs is not None
        token_id = self.prompt_ids[self.prefilled_tokens]
        self._prompt.logprobs.append(log_probabilities(logits, token_id, self.config.prompt_logprobs))
        return token_id

    def draft(self, most: int) -> tuple[tuple[int, ...], float]:
        """Up to `most` tokens that may come behind the next one to feed, and the chance of each to be right.

        There are no more than the output may still have and the context holds. Of a prompt that is fed token by token
        they are known.
        """
        if not self.is_prefilled:
            start = self.prefilled_tokens + 1
            return tuple(self.prompt_ids[start : start + most]), 1.0
        if self._drafter is None:
            self._drafter = Drafter(self.prompt_ids)
        return self._drafter.draft(self.token_ids, min(most, self._limit - len(self.token_ids) - 1))

    def learn(self, first: int) -> None:
        """Notes which of the last draft were right, from the output's tokens from `first` on."""
        if self._drafter is not None:
            self._drafter.learn(self.token_ids[first:])

    def share_prompt(self) -> None:
        """Starts behind the prompt, which another choice of the request has computed."""
        self.prefilled_tokens = len(self.prompt_ids)

    def advance(self, logits: NDArray[np.float32]) -> list[Event]:
        """Chooses the next token from logits [V].

        Returns:
            The token's event (none for a stop id), and the Completion if it was the last. Its error says so if the
            constraint failed.
        """
        try:
            return self._advance(logits)
        except ConstraintError as error:
            return [self.fail(error)]

    def _advance(self, logits: NDArray[np.float32]) -> list[Event]:
        token_id = self._sampler.choose(logits)
        if self._first_token is None:
            self._first_token = time.perf_counter()
        if token_id is None or token_id in self._ending_ids:
            return [self.finish(FinishReason.STOP)]
        self.token_ids.append(token_id)
        logprobs = None
        if self.config.logprobs is not None:
            logprobs = log_probabilities(logits, token_id, self.config.logprobs)
            self._logprobs.append(logprobs)
        cut = ""
        if self._detokenizer is not None and self._thoughts.ends_thought(token_id):
            cut, _ = self._pass(self._detokenizer.flush(), Part.THOUGHT)
        piece, part = self._thoughts.push(token_id, self._detokenizer.push(token_id) if self._detokenizer else "")
        text, is_stopped = self._pass(piece, part)
        if part is not Part.ANSWER:
            self._thought_tokens = len(self.token_ids)
        events: list[Event] = [TokenEvent(self.index, token_id, cut + text, logprobs, self.choice, part, len(cut))]
        if is_stopped:
            events.append(self._complete(FinishReason.STOP, ""))
        elif self._held is not None and self._held.is_finished:
            events.append(self.finish(FinishReason.STOP))
        elif len(self.token_ids) >= self._limit:
            events.append(self.finish(FinishReason.LENGTH))
        return events

    def finish(self, reason: FinishReason) -> Completion:
        """Ends the output; text that was held back comes out with it."""
        tail = self._thoughts.flush(self._detokenizer.flush() if self._detokenizer else "")
        text, is_stopped = self._pass(*tail)
        rest = self._stop.flush()
        self._text.append(rest)
        return self._complete(FinishReason.STOP if is_stopped else reason, text + rest)

    def fail(self, error: GenerationError) -> Completion:
        """Ends the output with what it had given out before its step failed."""
        return self._complete(FinishReason.ERROR, "", error)

    def _pass(self, text: str, part: Part) -> tuple[str, bool]:
        """Notes what of further text may be given out; whether a stop string ends it, if a constraint lets it."""
        is_stopped = False
        if part is not Part.ANSWER:  # no stop string counts in a thought
            self._thought_characters += len(text)
            if part is Part.THOUGHT:
                self._thought.append(text)
        elif text and self.config.stop:
            blank, text = self._blank_before_answer(text)
            blank, _ = self._stop.push(blank, may_stop=False)
            if text:
                text, is_stopped = self._stop.push(text, may_stop=self._held is None or self._held.may_end)
            text = blank + text
        self._text.append(text)
        return text, is_stopped

    def _blank_before_answer(self, text: str) -> tuple[str, str]:
        """Parts from an answer's text the line ends that stand between a thought and it: a stop of them is none."""
        if self._answer_has_begun or not self._thought_tokens:
            return "", text
        answer = text.lstrip("\n")
        self._answer_has_begun = bool(answer)
        return text[: len(text) - len(answer)], answer

    def _complete(self, reason: FinishReason, last_text: str, error: GenerationError | None = None) -> Completion:
        now = time.perf_counter()
        first_token = now if self._first_token is None else self._first_token
        return Completion(
            index=self.index,
            token_ids=tuple(self.token_ids),
            text="".join(self._text) if self._detokenizer else None,
            last_text=last_text,
            finish_reason=reason,
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self._prompt.cached_tokens,
            logprobs=tuple(self._logprobs),
            timings=Timings(self._prompt.seconds, first_token - self._arrived, now - first_token),
            error=error,
            choice=self.choice,
            prompt_logprobs=tuple(self._prompt.logprobs) if self.has_prompt_logprobs else None,
            thought="".join(self._thought),
            thought_characters=self._thought_characters,
            thought_tokens=self._thought_tokens,
        )
