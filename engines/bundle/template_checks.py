"""A checkpoint's chat template, parsed and rendered before anything is built: what would surprise whoever chats.

It is rendered by the code that renders it at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from qwen_aot.errors import BundleError, CheckpointError, GenerationError
from qwen_aot.runtime.text.chat_template import RESERVED, ChatTemplate

Messages = Sequence[Mapping[str, str]]

# Any words that no template has.
QUESTION, SECOND, ANSWER = "QwenAotFirstQuestion", "QwenAotSecondQuestion", "QwenAotAnswer"
_ASK: Messages = ({"role": "user", "content": QUESTION},)
_ANSWERED: Messages = (*_ASK, {"role": "assistant", "content": ANSWER})
_FOLLOWED: Messages = (*_ANSWERED, {"role": "user", "content": SECOND})

_GIVEN = RESERVED | {"documents"}  # what every render gets
_NAMED_TOKENS = frozenset(
    {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}
)  # that a tokenizer may not have


def _with_system(messages: Messages) -> Messages:
    return ({"role": "system", "content": "QwenAotSystem"}, *messages)


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What the renders of a template show.

    Attributes:
        warnings: of what won't work, or leaves something out.
        tails: what the template writes behind an assistant's answer: at the end of a conversation, and before the next
            question; without what it doesn't render.
    """

    warnings: tuple[str, ...]
    tails: tuple[str, ...]


def check_template(source: str, tokens: Mapping[str, Any]) -> TemplateFacts:
    """Parses and renders a chat template.

    Args:
        source: of the template.
        tokens: special tokens that it is given.

    Raises:
        CheckpointError: the template can't be parsed, so that no bundle with it could chat.
    """
    undefined: set[str] = set()
    try:
        plain = ChatTemplate(source, tokens)
        # A name that is given and undefined is as one that isn't given.
        missing = (plain.variables | _NAMED_TOKENS) - _GIVEN - tokens.keys()
        template = ChatTemplate(source, {**tokens, **{name: _Recorded(name, undefined) for name in missing}})
    except BundleError as error:
        raise CheckpointError(f"the checkpoint's chat template can't be used: {error}") from error
    warnings = list(_refusals(template))
    for messages in (_ANSWERED, _with_system(_ASK), _with_system(_FOLLOWED)):
        _render(template, messages, add_generation_prompt=False)  # for the names that it reads only there
    if undefined:
        warnings.append(
            f"the chat template writes {', '.join(sorted(undefined))}, which nothing defines (as in "
            "transformers): it comes out empty; name it in tokenizer_config.json, or repair the template"
        )
    return TemplateFacts(tuple(warnings), tuple(_tails(template)))


def check_others(named: object, tokens: Mapping[str, Any]) -> tuple[str, ...]:
    """Warnings of the templates beside the one in use: those that can't be parsed.

    Args:
        named: `chat_template` of tokenizer_config.json.
        tokens: special tokens that they are given.
    """
    if not isinstance(named, list):
        return ()
    warnings = []
    for entry in named:
        if entry["name"] == "default":
            continue
        try:
            ChatTemplate(entry["template"], tokens)
        except BundleError as error:
            warnings.append(f"the chat template {entry['name']!r} can't be used: {error}")
    if all(entry["name"] != "default" for entry in named):
        names = ", ".join(repr(entry["name"]) for entry in named)
        warnings.append(f"the checkpoint's chat templates are {names}, and none is the default: the bundle can't chat")
    return tuple(warnings)


def _refusals(template: ChatTemplate) -> Iterable[str]:
    """What it refuses of the conversations that every chat has, the first only, and what it leaves out."""
    for messages, what in ((_ASK, "a single question"), (_FOLLOWED, "a second question")):
        try:
            text = template.render(messages)
        except GenerationError as error:
            yield f"the chat template refuses {what}: {error}"
            return
        lacking = [part for part in (QUESTION, ANSWER, SECOND) if part in str(messages) and part not in text]
        if SECOND in lacking or (QUESTION in lacking and messages is _ASK):
            yield f"the chat template leaves out what the user says ({what})"
            return


def _render(template: ChatTemplate, messages: Messages, *, add_generation_prompt: bool) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=add_generation_prompt)
    except GenerationError:  # told where it matters
        return None


def _tails(template: ChatTemplate) -> Iterable[str]:
    for messages in (_ANSWERED, _FOLLOWED):
        text = _render(template, messages, add_generation_prompt=False)
        if text is None:
            text = _render(template, _with_system(messages), add_generation_prompt=False)
        if text is not None and ANSWER in text:
            yield text.rpartition(ANSWER)[2].partition(SECOND)[0]


class _Recorded(jinja2.Undefined):
    """A name that nothing defines, told when it is written or walked over; testing it (`if tools`) is no use of it."""

    __slots__ = ("_used",)

    def __init__(self, name: str, used: set[str]) -> None:
        super().__init__(name=name)
        self._used = used

    def __str__(self) -> str:
        self._used.add(str(self._undefined_name))
        return super().__str__()

    def __iter__(self) -> Iterator[Any]:
        self._used.add(str(self._undefined_name))
        return super().__iter__()

    def __len__(self) -> int:
        self._used.add(str(self._undefined_name))
        return super().__len__()
