"""A bundle's chat template, rendered in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Message"]


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
