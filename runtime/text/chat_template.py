"""A bundle's chat template, rendered in a sandbox."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["RESERVED", "ChatTemplate", "Message", "template_tokens"]


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

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """A Jinja chat template with the helpers that transformers gives it.

    Source: https://huggingface.co/docs/transformers/chat_templating
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Compiles the template.

        Args:
            source: `chat_template` of tokenizer_config.json.
            special_tokens: what the template sees as `bos_token`, `eos_token`, ...: see `template_tokens`.

        Raises:
            BundleError: it isn't a template.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(
                f"the bundle's chat template can't be parsed (line {error.lineno}: {error.message}); repair "
                f"chat_template in the checkpoint's tokenizer_config.json and rebuild"
            ) from error
        names = jinja2.meta.find_undeclared_variables(tree) - set(environment.globals)
        self._variables = frozenset(names - RESERVED - set(_NAMED_TOKENS) - set(self._special_tokens))

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads besides what it always gets: `enable_thinking`, ..."""
        return self._variables

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


def template_tokens(config: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """The special tokens that transformers gives a template, by their names in it.

    Args:
        config: tokenizer_config.json.
    """
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    for group in ("model_specific_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(group), Mapping):  # names of a model's own, such as image_token
            named |= config[group]
    found: dict[str, str | list[str]] = {}
    for name, value in named.items():
        text = _content(value)
        if text is not None:
            found[name] = text
    more = config.get("additional_special_tokens")
    if isinstance(more, list):
        found["additional_special_tokens"] = [text for value in more if (text := _content(value)) is not None]
    return found


def _content(token: Any) -> str | None:
    """A token's text, which may stand alone or in an object beside how it is matched."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


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
