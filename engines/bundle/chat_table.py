"""A compiled chat template: literals keyed by role, neighbor, first and last, and how they stand in chat.qtpl.

This is also what `runtime/capi/src/text/chat_template.cpp` does, in a form that a build can prove before it writes it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qwen_aot.engines.bundle.chat_rules import THOUGHT_CLOSE, THOUGHT_OPEN, Query, Rule, after_query, apply

__all__ = ["ASSISTANT", "ROLES", "ChatTable", "Control", "Refused", "Slot", "Variant"]

ROLES = ("system", "user", "assistant")
ASSISTANT = 2
MAGIC = b"QAOTQTPL"
VERSION = 1
_NONE = 0xFFFFFFFF

Messages = Sequence[tuple[str, str]]  # role and content


class Refused(Exception):  # noqa: N818  # what a conversation is, not a failure
    """The template refuses this order of roles."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A stretch of a rendered text, and whose it is: a role's number, or None for the template's own."""

    text: str
    role: int | None


@dataclass(frozen=True, slots=True)
class Control:
    """A control token."""

    text: str
    id: int
    is_special: bool


@dataclass(slots=True)
class Variant:
    """The literals under one value of `enable_thinking`. A key that is absent: the template refuses it.

    Attributes:
        head: (role of the first message, is it the only one) -> text before it.
        between: (is the left one the first, its role, the right one's role, is that the last) -> text between them.
        end: (role of the last message, is it the only one) -> text behind it, up to where the answer begins.
        rules: (role, is it the first, the last, behind the last query) -> what becomes of the content.
    """

    head: dict[tuple[int, bool], str] = field(default_factory=dict)
    between: dict[tuple[bool, int, int, bool], str] = field(default_factory=dict)
    end: dict[tuple[int, bool], str] = field(default_factory=dict)
    rules: dict[tuple[int, bool, bool, bool], Rule] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatTable:
    """A compiled template.

    Attributes:
        variants: one, if the template doesn't read `enable_thinking`; else those of: not given, false, true.
        query: where kept thoughts begin.
        controls: tokens that the texts of a conversation only spell.
    """

    variants: tuple[Variant, ...]
    query: Query
    controls: tuple[Control, ...]

    def slots(self, messages: Messages, variant: int = 0, query: Query | None = None) -> list[Slot]:
        """A conversation's text in stretches, up to where the answer begins.

        Args:
            messages: at least one; their roles are of ROLES.
            variant: its number.
            query: in place of the template's own.

        Raises:
            Refused: the template takes no such order of roles.
        """
        table = self.variants[variant]
        roles = [ROLES.index(role) for role, _ in messages]
        last = len(messages) - 1
        after = after_query(self.query if query is None else query, messages)
        try:
            found = [Slot(table.head[roles[0], last == 0], None)]
            for index, (_, content) in enumerate(messages):
                rule = table.rules[roles[index], index == 0, index == last, index >= after]
                found += [Slot(part.text, None if part.is_own else roles[index]) for part in apply(rule, content)]
                if index < last:
                    key = (index == 0, roles[index], roles[index + 1], index + 1 == last)
                    found.append(Slot(table.between[key], None))
            found.append(Slot(table.end[roles[last], last == 0], None))
        except KeyError:
            raise Refused from None
        return found

    def render(self, messages: Messages, variant: int = 0) -> str:
        """A conversation's text. Raises as `slots`."""
        return "".join(slot.text for slot in self.slots(messages, variant))

    def own_tokens(self, slots: Sequence[Slot]) -> list[tuple[int, int]]:
        """Where the control tokens of a rendered text are, as places of characters: the template's, the model's own."""
        found, position = [], 0
        for slot in slots:
            if slot.role is None or slot.role == ASSISTANT:
                controls = [control for control in self.controls if slot.role is None or not control.is_special]
                found += [(position + start, position + end) for start, end, _ in _find(slot.text, controls)]
            position += len(slot.text)
        return found

    def acts_on_text(self, messages: Messages, variant: int = 0) -> bool:
        """Whether the template says something else because a text spells a control token, which is then no text."""
        if self.query is not Query.LAST_USER_SPEAKING or not self.query_is_control:
            return False
        other = self.slots(messages, variant, Query.LAST_USER)
        return self.render(messages, variant) != "".join(slot.text for slot in other)

    @property
    def query_is_control(self) -> bool:
        """Whether what the query's rule looks for is a control token."""
        return any(control.text in ("<tool_response>", "</tool_response>") for control in self.controls)

    def literals(self) -> Iterator[str]:
        """The template's own texts, with repetitions."""
        for variant in self.variants:
            yield from (*variant.head.values(), *variant.between.values(), *variant.end.values())
        if any(rule in (Rule.THOUGHT, Rule.THOUGHT_IF_ANY) for each in self.variants for rule in each.rules.values()):
            yield from (THOUGHT_OPEN, THOUGHT_CLOSE)

    def to_bytes(self) -> bytes:
        """The content of chat.qtpl; docs/compiled-text.md has its layout."""
        texts = _Texts()
        literals = list(dict.fromkeys(self.literals()))
        number = {literal: index for index, literal in enumerate(literals)}
        pieces: list[tuple[int, int, int]] = []
        ranges = []
        for literal in literals:
            first = len(pieces)
            pieces += self._pieces(literal, texts)
            ranges.append((first, len(pieces) - first))
        controls = [(*texts.add(each.text), each.id, int(each.is_special)) for each in self.controls]
        roles = [(*texts.add(role), int(index == ASSISTANT)) for index, role in enumerate(ROLES)]
        variants = [word for variant in self.variants for word in _words(variant, number)]
        counts = (len(self.controls), len(ROLES), len(literals), len(pieces), len(self.variants), len(texts.bytes))
        thought = [number.get(text, _NONE) for text in (THOUGHT_OPEN, THOUGHT_CLOSE)]
        words = [*counts, int(self.query), int(self.query_is_control), *thought]
        words += [word for row in (*controls, *roles, *ranges, *pieces) for word in row]
        body = struct.pack(f"<{len(words) + len(variants)}I", *words, *variants) + texts.bytes
        return struct.pack("<8sIIII", MAGIC, VERSION, 24 + len(body), zlib.crc32(body), 0) + body

    def _pieces(self, literal: str, texts: _Texts) -> Iterator[tuple[int, int, int]]:
        """A literal as texts (offset, bytes, _NONE) and control tokens (offset, bytes, id)."""
        position = 0
        for start, end, control in _find(literal, self.controls):
            if start > position:
                yield (*texts.add(literal[position:start]), _NONE)
            yield (*texts.add(control.text), control.id)
            position = end
        if position < len(literal):
            yield (*texts.add(literal[position:]), _NONE)


class _Texts:
    """UTF-8 texts one behind the other, each once."""

    def __init__(self) -> None:
        self.bytes = b""
        self._places: dict[bytes, tuple[int, int]] = {}

    def add(self, text: str) -> tuple[int, int]:
        encoded = text.encode()
        if encoded not in self._places:
            self._places[encoded] = (len(self.bytes), len(encoded))
            self.bytes += encoded
        return self._places[encoded]


def _find(text: str, controls: Sequence[Control]) -> list[tuple[int, int, Control]]:
    """Where tokens are, of which none overlaps another."""
    found = []
    for control in controls:
        start = text.find(control.text)
        while start >= 0:
            found.append((start, start + len(control.text), control))
            start = text.find(control.text, start + len(control.text))
    return sorted(found, key=lambda place: place[0])


def _words(variant: Variant, number: Mapping[str, int]) -> Iterator[int]:
    """A variant's keys in order, each with the number of its literal or rule."""
    roles, flags = range(len(ROLES)), (False, True)

    def literal(text: str | None) -> int:
        return _NONE if text is None else number[text]

    yield from (literal(variant.head.get((role, only))) for role in roles for only in flags)
    for first in flags:
        for left in roles:
            yield from (literal(variant.between.get((first, left, right, last))) for right in roles for last in flags)
    yield from (literal(variant.end.get((role, only))) for role in roles for only in flags)
    for role in roles:
        for first in flags:
            for last in flags:
                yield from (int(variant.rules.get((role, first, last, after), _NONE)) for after in flags)
