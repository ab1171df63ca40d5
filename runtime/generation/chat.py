"""Chat: the bundle's template rendered in a sandbox, and a conversation whose cache is kept between turns."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_aot.errors import BundleError, ContextFullError, GenerationError
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.generator import EventStream, Generator
from qwen_aot.runtime.generation.request import Completion, Request
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["Chat", "ChatTemplate"]

Message = Mapping[str, str]  # role, content

# A template is foreign code: besides Jinja's own errors, its expressions raise these.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A Jinja chat template with the helpers that transformers gives it.

    Source: https://huggingface.co/docs/transformers/chat_templating
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compiles the template.

        Args:
            source: `chat_template` of tokenizer_config.json.
            special_tokens: what the template sees as `bos_token`, `eos_token`, ...

        Raises:
            BundleError: it isn't a template.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(
                f"the bundle's chat template can't be parsed (line {error.lineno}: {error.message}); repair "
                f"chat_template in the checkpoint's tokenizer_config.json and rebuild"
            ) from error

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer | None) -> ChatTemplate:
        """The bundle's template.

        Raises:
            GenerationError: the bundle has no tokenizer, or its tokenizer no template.
        """
        source = tokenizer.chat_template if tokenizer else None
        if tokenizer is None or source is None:
            missing = "chat template" if tokenizer else "tokenizer"
            raise GenerationError(
                f"the bundle has no {missing}, so it can't chat: use `qwen-aot generate`, or rebuild it from a "
                "checkpoint whose tokenizer_config.json has a chat_template"
            )
        return cls(source, tokenizer.special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, special tokens written out.

        Args:
            messages: with `role` and `content`; a default system prompt is the template's business.
            add_generation_prompt: end with the opening of the assistant's answer.

        Raises:
            GenerationError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,  # as transformers, whose templates may ask `tools is not none`
                documents=None,
                **self._special_tokens,
            )
        except _TEMPLATE_FAILURES as error:
            raise GenerationError(f"the chat template refuses these messages: {error}") from error


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
        request = Request(ids, self._config, cancel, keep_cache=True)
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


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().astimezone().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which a prompt must not have."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
