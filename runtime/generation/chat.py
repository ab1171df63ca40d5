"""Chat: a conversation whose cache is kept between turns."""

from __future__ import annotations

import contextlib
import threading

from qwen_aot.errors import ContextFullError
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.generator import EventStream, Generator
from qwen_aot.runtime.generation.request import Completion, Request
from qwen_aot.runtime.text.chat_template import ChatTemplate, Message

__all__ = ["Chat"]


class Chat:
    """One conversation. The tokens that a turn shares with the cache are not computed again.

    Example:
        >>> chat = Chat(generator, system="You are terse.")
        >>> for event in chat.send("Hello"):
        ...     print(event.text if isinstance(event, TokenEvent) else event.last_text, end="")
    """

    def __init__(
        self, generator: Generator, config: GenerationConfig | None = None, *, system: str | None = None
    ) -> None:
        """Starts an empty conversation.

        Args:
            generator: serves one conversation at a time for each of its rows; others reuse less.
            config: of every answer; None: the bundle's defaults.
            system: the system prompt; None: the template's own, if it has one.

        Raises:
            GenerationError: the bundle has no tokenizer or template.
        """
        self._generator = generator
        self._template = ChatTemplate.from_tokenizer(generator.tokenizer)
        self._config = config or generator.defaults.resolve()
        self._system = system
        self._messages: list[Message] = []
        self.reset()

    @property
    def generator(self) -> Generator:
        """What answers."""
        return self._generator

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        return tuple(self._messages)

    def reset(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def send(self, text: str, *, cancel: threading.Event | None = None) -> EventStream:
        """Says something and streams the answer; the last event is its Completion.

        The turn is added to the conversation when the stream ends or is closed (with what was answered by then).
        If it raises, the conversation is as it was before.

        Raises:
            ContextFullError: the conversation doesn't fit the context any more.
            GenerationError: see `Generator.stream`.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        assert self._generator.tokenizer is not None
        ids = self._generator.tokenizer.encode(self._template.render(messages), add_special_tokens=False)
        max_context = self._generator.engine.manifest.max_context
        if len(ids) > max_context:
            raise ContextFullError(
                f"the conversation has {len(ids)} tokens with this turn, the context holds {max_context}: start a new "
                "conversation (/clear in the terminal), say less at once, or rebuild the bundle with a larger "
                "--max-context"
            )
        request = Request(ids, self._config, cancel, keep_cache=True, is_chat=True)
        return self._answer(messages, self._generator.stream([request]))

    def _answer(self, messages: list[Message], events: EventStream) -> EventStream:
        answer = ""
        with contextlib.closing(events):
            try:
                for event in events:
                    answer += event.last_text if isinstance(event, Completion) else event.text
                    yield event
            except GeneratorExit:
                self._add(messages, answer)
                raise
        self._add(messages, answer)

    def _add(self, messages: list[Message], answer: str) -> None:
        self._messages = [*messages, {"role": "assistant", "content": answer}]
