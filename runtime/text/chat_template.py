"""A chat template, rendered in a sandbox as transformers renders it."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.utils import Namespace

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.text.template_budget import BudgetedEnvironment, budget

__all__ = ["RESERVED", "ChatTemplate", "Message", "parse_template", "template_tokens"]

Message: TypeAlias = Mapping[
    str, Any
]  # role, content; also name, tool_calls, reasoning_content and what templates read

# A template is foreign code: besides Jinja's own errors, its expressions raise these.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # among them RecursionError
    TypeError,
    ValueError,
)
# And Python's compiler of what Jinja makes of a template: nested too deeply, a name or `break` where none may be, a
# number of too many digits.
_COMPILER_FAILURES = (MemoryError, RecursionError, SyntaxError, ValueError)

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})
# A message's reasoning has these names. Templates read the first, and gpt-oss' the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PROBE = "a text in parts"


class ChatTemplate:
    """A Jinja chat template in the environment of transformers 5.24: the same helpers, the same variables.

    Source: https://huggingface.co/docs/transformers/chat_templating, transformers/utils/chat_template_utils.py
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any] | None = None) -> None:
        """Compiles the template.

        Args:
            source: `chat_template` of tokenizer_config.json.
            special_tokens: what the template sees as `bos_token`, `eos_token`, ...: see `template_tokens`.

        Raises:
            BundleError: it isn't a template.
        """
        environment = _environment()
        self._special_tokens = dict(special_tokens or {})
        try:
            tree = environment.parse(source)
            names = jinja2.meta.find_undeclared_variables(tree) - set(environment.globals)
            literals = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
            literals |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
            self._template = environment.counting(tree)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(
                f"the bundle's chat template can't be parsed (line {error.lineno}: {error.message}); repair "
                f"chat_template in the checkpoint's tokenizer_config.json and rebuild"
            ) from error
        except _COMPILER_FAILURES as error:
            raise BundleError(
                f"the bundle's chat template can't be compiled ({error}); repair chat_template in the checkpoint's "
                "tokenizer_config.json and rebuild"
            ) from error
        self._takes_tools = "tools" in names
        self._variables = frozenset(names - RESERVED - set(_NAMED_TOKENS) - set(self._special_tokens))
        self._literals = tuple(sorted(literals))

    @property
    def takes_tools(self) -> bool:
        """Whether the template reads `tools`."""
        return self._takes_tools

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads besides what it always gets: `enable_thinking`, ..."""
        return self._variables

    @property
    def literals(self) -> tuple[str, ...]:
        """The texts that the template's own source holds."""
        return self._literals

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template reads a content that is a list of parts."""
        messages = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        try:
            text = self.render(messages)
        except GenerationError:
            return False
        return _PROBE in text and str(messages[0]["content"]) not in text

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        now: datetime.datetime | None = None,
        max_steps: int | None = None,
    ) -> str:
        """The conversation as text, special tokens written out.

        Args:
            messages: with `role` and `content`; a default system prompt is the template's business. As in
                transformers, an entry that is None isn't there, and reasoning is found under each of its names.
            tools: JSON schemas.
            variables: what else the template reads (`documents`, `enable_thinking`, ...), none of RESERVED.
            add_generation_prompt: end with the opening of the assistant's answer.
            now: the time that a template which asks gets; None: the clock's.
            max_steps: rounds of loops and calls that it may take; None: as many as any.

        Raises:
            GenerationError: the template refuses the messages.
        """
        clock = now or datetime.datetime.now()
        given = {"documents": None, "strftime_now": clock.strftime, **self._special_tokens, **(variables or {})}
        given |= {
            "messages": [_with_reasoning_names(message) for message in messages],
            "tools": tools,  # None if there are none: templates ask `tools is not none`
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with budget(max_steps):
                return self._template.render(given)
        except _TEMPLATE_FAILURES as error:
            raise GenerationError(f"the chat template refuses these messages: {error}") from error


def parse_template(source: str) -> jinja2.nodes.Template:
    """A template's syntax, in the environment in which it is rendered.

    Raises:
        jinja2.TemplateSyntaxError: it isn't a template.
    """
    return _environment().parse(source)


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


def _with_reasoning_names(message: Message) -> dict[str, Any]:
    there = {key: value for key, value in message.items() if value is not None}
    reasoning = next((there[name] for name in _REASONING if name in there), None)
    return there if reasoning is None else {"thinking": reasoning, **there, "reasoning_content": reasoning}


def _environment() -> BudgetedEnvironment:
    environment = BudgetedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}`: names the assistant's part for training. What it holds, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


class _Dict:
    """`dict` without what its class would give a template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that `namespace(self=...)` works
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no name {name!r}: it begins with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which a prompt must not have."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
