"""Chat: a conversation whose cache is kept between turns."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.generator import EventStream, Generator
from qwen_aot.runtime.generation.options import check_names
from qwen_aot.runtime.generation.request import Completion
from qwen_aot.runtime.text.chat_template import Message
from qwen_aot.runtime.vision.pictures import Picture, open_picture

__all__ = ["Chat"]


class Chat:
    """One conversation. The tokens that a turn shares with the cache are not computed again.

    Example:
        >>> chat = Chat(generator, system="You are terse.", max_new_tokens=64)
        >>> for event in chat.send("Hello"):
        ...     print(event.text if isinstance(event, TokenEvent) else event.last_text, end="")
    """

    def __init__(
        self,
        generator: Generator,
        config: GenerationConfig | None = None,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        allow_special_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Starts an empty conversation.

        Args:
            generator: serves one conversation at a time for each of its rows; others reuse less.
            config: of every answer; None: the bundle's defaults.
            system: the system prompt; None: the template's own, if it has one.
            tools: see `Generator.chat_request`.
            allow_special_tokens: see `Generator.chat_request`.
            template_variables: see `Generator.chat_request`.
            options: see `Generator.chat_request`; `n` isn't one, as a conversation has one answer to each turn.

        Raises:
            GenerationError: the bundle has no tokenizer or template, or a value can't be taken.
            TypeError: there is no such option.
        """
        self._generator = generator
        self._request = functools.partial(
            generator.chat_request,
            config=config,
            tools=tools,
            allow_special_tokens=allow_special_tokens,
            template_variables=template_variables,
            **options,
        )
        check_names(options, "Chat()", others=generator.chat_encoder.template.variables)
        if options.get("n", 1) != 1 or (config is not None and config.n != 1):
            raise GenerationError("a Chat has one answer to each turn: leave n out, or use Generator.chat")
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

    def send(
        self,
        text: str,
        *,
        images: Sequence[Picture | Path | bytes] = (),
        cancel: threading.Event | None = None,
    ) -> EventStream:
        """Says something and streams the answer; the last event is its Completion.

        The turn is added to the conversation when the stream ends or is closed (with what was answered by then).
        If it raises, the conversation is as it was before.

        Args:
            text: of the message.
            images: in front of the text: decoded ones, files, or the content of files. The conversation keeps the
                square that the model sees, not the picture.
            cancel: set it to end the answer.

        Raises:
            ContextFullError: the conversation doesn't fit the context any more.
            GenerationError: see `Generator.stream` and `open_picture`; the bundle takes no images.
        """
        content: str | list[dict[str, object]] = text
        if images:
            size = self._generator.image_encoder.image_size
            parts = [{"type": "image", "image": open_picture(image).reduced(size)} for image in images]
            content = [*parts, {"type": "text", "text": text}]
        messages = [*self._messages, {"role": "user", "content": content}]
        return self._answer(messages, self._generator.stream(self._request(messages=messages, cancel=cancel)))

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
