"""Compiles a chat template: probes it with marked messages, then proves the table against Jinja.

The template stays the reference. What doesn't fit a table of literals and named rules is refused, and the bundle is
built without one: `runtime.text.chat_template` renders it all the same.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle import chat_whitelist
from qwen_aot.engines.bundle.chat_rules import PROBES, Query, Rule, after_query, apply
from qwen_aot.engines.bundle.chat_table import ROLES, ChatTable, Control, Messages, Refused, Variant
from qwen_aot.errors import BuildError, GenerationError
from qwen_aot.runtime.text.chat_encoder import ChatEncoder
from qwen_aot.runtime.text.chat_template import ChatTemplate, parse_template, template_tokens
from qwen_aot.runtime.text.control_tokens import ControlTokens
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["COMPILED_CHAT_NAME", "ChatNotCompiledError", "chat_table", "compile_chat"]

COMPILED_CHAT_NAME = "chat.qtpl"

_RENDERS = 2_400  # conversations of the proof, for each value of `enable_thinking` a part of them
_ENCODED = 150  # of which the ids are compared too
_STEPS = 5_000  # of a render; a long conversation takes some 1,000, and a template that takes all of them costs seconds
_LONG = chat_whitelist.MAX_NUMBERS + 16  # messages of a long conversation, characters of a long text

_THINKING: tuple[Mapping[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})


class ChatNotCompiledError(BuildError):
    """A chat template that isn't one of literals and named rules; the message says what it does instead."""


def compile_chat(tokenizer: Tokenizer) -> bytes:
    """The content of chat.qtpl for a tokenizer that has a chat template.

    Raises:
        ChatNotCompiledError: the template is of another shape.
    """
    return chat_table(tokenizer).to_bytes()


def chat_table(tokenizer: Tokenizer) -> ChatTable:
    """Compiles the chat template of a tokenizer that has one.

    Raises:
        ChatNotCompiledError: it is of another shape.
    """
    assert tokenizer.chat_template is not None
    tokens = template_tokens(tokenizer.config)
    try:
        tree = parse_template(tokenizer.chat_template)
        reason = chat_whitelist.refusal(tree)
    except RecursionError:
        reason = "it is nested too deeply"
    if reason is not None:
        raise ChatNotCompiledError(reason)
    template = ChatTemplate(tokenizer.chat_template, tokens)
    control = ControlTokens(tokenizer.backend, others=tokenizer.chat_control_tokens, literals=template.literals)
    controls = _controls(tokenizer.backend, control)
    texts = _Texts(chat_whitelist.texts_of(tree), [each.text for each in controls])
    thinking = _THINKING if "enable_thinking" in template.variables else _THINKING[:1]
    reasons: list[ChatNotCompiledError] = []  # in the end, of the query that came furthest
    for query in Query:
        try:
            table = ChatTable(tuple(_Probed(template, each, query).variant() for each in thinking), query, controls)
        except ChatNotCompiledError as error:
            reasons.append(error)
            continue
        try:
            _check_edges(table)
            for number, each in enumerate(thinking):
                _prove(table, number, template, each, texts, _RENDERS // len(thinking))
            _prove_ids(table, ChatEncoder(tokenizer, template), control, thinking, texts)
        except ChatNotCompiledError as error:
            reasons.insert(0, error)
            continue
        return table
    raise reasons[0]


def _controls(backend: RustTokenizer, control: ControlTokens) -> tuple[Control, ...]:
    """The control tokens, which must be told from text wherever they stand."""
    found = []
    added = sorted(backend.get_added_tokens_decoder().items())
    for id_, token in added:
        if token.content not in control.all:
            continue
        if token.lstrip or token.rstrip or token.single_word or (token.normalized and backend.normalizer is not None):
            raise ChatNotCompiledError(f"its control token {token.content!r} takes or looks at what stands beside it")
        if not token.content or token.content != token.content.strip():
            raise ChatNotCompiledError(f"its control token {token.content!r} has whitespace at its ends")
        found.append(Control(token.content, id_, is_special=token.content in control.special))
    for each in found:
        for id_, token in added:
            if id_ != each.id and token.content and _overlap(each.text, token.content):
                raise ChatNotCompiledError(f"the tokens {each.text!r} and {token.content!r} overlap")
        if _goes_into(each.text, each.text):
            raise ChatNotCompiledError(f"the token {each.text!r} overlaps itself")
    return tuple(found)


def _overlap(one: str, other: str) -> bool:
    return one in other or other in one or _goes_into(one, other) or _goes_into(other, one)


def _goes_into(left: str, right: str) -> bool:
    """Whether an end of one text, but not all of it, is the beginning of another."""
    return any(left.endswith(right[:size]) for size in range(1, min(len(left), len(right))))


def _check_edges(table: ChatTable) -> None:
    """A control token may stand in a literal, or in a text, and never in parts of both."""
    literals = set(table.literals())
    if any("" in variant.between.values() for variant in table.variants):
        raise ChatNotCompiledError("it writes nothing between two messages")
    for control, literal in itertools.product(table.controls, literals):
        heads = (control.text[:size] for size in range(1, len(control.text)))
        tails = (control.text[size:] for size in range(1, len(control.text)))
        if literal.endswith(tuple(heads)) or literal.startswith(tuple(tails)):
            raise ChatNotCompiledError(f"it writes a part of {control.text!r} beside a message")


class _Probed:
    """A template under one value of `enable_thinking`, probed with messages whose texts are unlike any others."""

    def __init__(self, template: ChatTemplate, variables: Mapping[str, Any], query: Query) -> None:
        self._template = template
        self._variables = variables
        self._query = query

    def variant(self) -> Variant:
        """Its table.

        Raises:
            ChatNotCompiledError: its renders contradict each other.
        """
        found = Variant()
        for count in (1, 2, 3, 4):
            for roles in itertools.product(range(len(ROLES)), repeat=count):
                self._probe(roles, found)
        for roles in ((1, 2, 1, 2, 1), (1, 2, 1, 2, 1, 2), (0, 1, 2, 1, 2, 1), (0, 1, 2, 1, 2, 1, 2)):
            self._probe(roles, found)  # where roles must take turns
        if not found.head:
            raise ChatNotCompiledError("it refuses every conversation")
        for (role, first, last, after), rule in list(found.rules.items()):
            if not after:  # a user's <tool_response>, which no probe is, stands behind the last query
                found.rules.setdefault((role, first, last, True), rule)
        return found

    def _render(self, messages: Messages) -> str | None:
        return _render(self._template, messages, self._variables)

    def _probe(self, roles: Sequence[int], found: Variant) -> None:
        messages = [(ROLES[role], f"\U000f0000{index}\U000f0001") for index, role in enumerate(roles)]
        text = self._render(messages)
        if text is None:
            return
        last, after = len(roles) - 1, after_query(self._query, messages)
        literals, position = [], 0
        for index, (role, content) in enumerate(messages):
            if text.count(content) != 1 or (start := text.find(content, position)) < 0:
                raise ChatNotCompiledError(f"it doesn't write each content once, in order (a message of role {role})")
            key = (roles[index], index == 0, index == last, index >= after)
            rule = found.rules.get(key)
            if rule is None:
                rule = found.rules[key] = self._rule(messages, index, text, start)
            own = "".join(part.text for part in apply(rule, content) if part.is_own)
            if not text[position:start].endswith(own):
                raise ChatNotCompiledError(
                    f"what it writes before messages of role {role} depends on more than neighbors"
                )
            literals.append(text[position : start - len(own)])
            position = start + len(content)
        literals.append(text[position:])
        _put(found.head, (roles[0], last == 0), literals[0])
        for index in range(last):
            key_between = (index == 0, roles[index], roles[index + 1], index + 1 == last)
            _put(found.between, key_between, literals[index + 1])
        _put(found.end, (roles[last], last == 0), literals[-1])

    def _rule(self, messages: Messages, index: int, text: str, start: int) -> Rule:
        """Which of the rules a content of this message follows."""
        role, content = messages[index]
        renders = {}
        for probe in PROBES:
            changed = self._render([*messages[:index], (role, probe), *messages[index + 1 :]])
            if changed is None:
                raise ChatNotCompiledError(f"it refuses some contents of role {role}")
            renders[probe] = changed
        for rule in Rule:
            own = "".join(part.text for part in apply(rule, content) if part.is_own)
            if not text[:start].endswith(own):
                continue
            before, behind = text[: start - len(own)], text[start + len(content) :]
            if all(
                changed == before + "".join(part.text for part in apply(rule, probe)) + behind
                for probe, changed in renders.items()
            ):
                return rule
        raise ChatNotCompiledError(f"what it does with contents of role {role} is none of the known rules")


def _put(table: dict[Any, str], key: Any, literal: str) -> None:
    if table.setdefault(key, literal) != literal:
        raise ChatNotCompiledError(
            f"what it writes beside a message depends on more than neighbors: {table[key]!r} and {literal!r}"
        )


def _render(template: ChatTemplate, messages: Messages, variables: Mapping[str, Any]) -> str | None:
    try:
        objects = [{"role": role, "content": text} for role, text in messages]
        return template.render(objects, variables=variables, max_steps=_STEPS)
    except GenerationError as error:
        if isinstance(error.__cause__, SecurityError):
            raise ChatNotCompiledError(str(error.__cause__)) from error
        return None


class _Texts:
    """Contents that a template could act on: its own texts, control tokens and parts of them, thoughts, whitespace."""

    def __init__(self, own: Sequence[str], controls: Sequence[str]) -> None:
        parts = [text[: len(text) // 2] for text in controls] + [text[len(text) // 2 :] for text in controls]
        self._pieces = [
            *("a", "word", "some words", "7", "é", "\u4f60\u597d", "{{ x }}", "{% if %}", "None", "[]", "'", '"', "\\"),
            *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\x1f", "\u200b", "\x00"),
            *("<think>", "</think>", "<think>\n", "\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ]
        self._special = [*controls, *own, *parts, "<tool_response>", "</tool_response>", *ROLES]

    def content(self, chance: random.Random) -> str:
        kind = chance.random()
        if kind < 0.04:
            return ""
        if kind < 0.1:
            return f"<tool_response>{self._joined(chance, 2)}</tool_response>"
        if kind < 0.2:
            return f"<think>{self._joined(chance, 3)}</think>{self._joined(chance, 3)}"
        if kind < 0.22:
            return (self._joined(chance, 40) + "x" * _LONG)[: 2 * _LONG]
        return self._joined(chance, 5)

    def _joined(self, chance: random.Random, most: int) -> str:
        return "".join(
            chance.choice(self._special if chance.random() < 0.4 else self._pieces)
            for _ in range(chance.randrange(1, most + 1))
        )

    def conversation(self, chance: random.Random, count: int) -> Messages:
        roles = [chance.choice(ROLES) for _ in range(count)]
        if chance.random() < 0.5:  # as chats are: templates may refuse others
            first = chance.random() < 0.4
            roles = [ROLES[1 + (index + first) % 2] for index in range(count)]
            roles[0] = "system" if first else roles[0]
        return [(role, self.content(chance)) for role in roles]


def _prove(
    table: ChatTable, variant: int, template: ChatTemplate, variables: Mapping[str, Any], texts: _Texts, count: int
) -> None:
    """Compares with the template over generated conversations.

    Raises:
        ChatNotCompiledError: it says something else of one.
    """
    chance = random.Random(variant)
    for number in range(count):
        length = _LONG + chance.randrange(16) if number < 4 else chance.randrange(1, 8)
        messages = texts.conversation(chance, length)
        expected = _render(template, messages, variables)
        try:
            found = table.render(messages, variant)
        except Refused:
            found = None
        if found != expected:
            raise ChatNotCompiledError(f"it isn't literals and known rules: {_difference(found, expected)}")


def _difference(found: str | None, expected: str | None) -> str:
    if found is None or expected is None:
        return "it refuses some conversations for what they say, or in which place"
    start = next((at for at, (left, right) in enumerate(zip(found, expected, strict=False)) if left != right), 0)
    start = max(0, start - 12)
    return f"{expected[start : start + 40]!r} was {found[start : start + 40]!r}"


def _prove_ids(
    table: ChatTable,
    encoder: ChatEncoder,
    control: ControlTokens,
    thinking: Sequence[Mapping[str, Any]],
    texts: _Texts,
) -> None:
    """Compares the places of control tokens with the runtime's, by the ids that come of them.

    Raises:
        ChatNotCompiledError: they are others.
    """
    chance = random.Random(len(thinking))
    for number in range(_ENCODED):
        variant = number % len(thinking)
        messages = texts.conversation(chance, chance.randrange(1, 6))
        objects = [{"role": role, "content": text} for role, text in messages]
        try:
            slots = table.slots(messages, variant)
            if table.acts_on_text(messages, variant):
                continue  # the runtime refuses it; so will the table's reader
            text = "".join(slot.text for slot in slots)
            found = control.encode(text, table.own_tokens(slots))
            expected = encoder.encode(objects, variables=thinking[variant])
        except Refused:
            continue
        except GenerationError as error:
            raise ChatNotCompiledError(f"texts with control tokens are refused: {error}") from error
        if found != expected:
            raise ChatNotCompiledError("control tokens in texts aren't told from its own by its literals")
