"""Grammar: what the text of an answer may be, in llguidance's Lark, with JSON schemas in it.

Source: llguidance's docs/syntax.md and docs/json_schema.md, https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ANY_OBJECT", "Grammar", "HeldJson", "json_grammar", "literal", "make_grammar"]

# Between two parts of JSON. Without a bound a model may write nothing else until it is cut.
MAX_WHITESPACE = 32
_WHITESPACE = {"whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MAX_WHITESPACE}}}"}

# Tokens are the model's choice, also where the text is none: forced ones would be spelled by a second tokenizer.
_OPTIONS = '%llguidance {"no_forcing": true}'

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class HeldJson:
    """A part of a grammar: JSON that a schema describes.

    Attributes:
        schema: checked by `json_schema.check_schema`.
        where: its place in the body.
    """

    schema: Mapping[str, Any] | bool
    where: str

    @property
    def json(self) -> str:
        """The schema as llguidance gets it."""
        schema: Any = self.schema
        if isinstance(schema, Mapping):
            schema = {**schema, "x-guidance": _WHITESPACE}
        elif schema:
            schema = {"x-guidance": _WHITESPACE}
        return json.dumps(schema)


@dataclass(frozen=True, slots=True)
class Grammar:
    """One grammar.

    Attributes:
        lark: its text.
        parts: the schemas in it.
        where: the field of the body that asks for it.
    """

    lark: str
    parts: tuple[HeldJson, ...]
    where: str


def make_grammar(start: str, rules: Mapping[str, str], parts: Mapping[str, HeldJson], where: str) -> Grammar:
    """Writes a grammar.

    Args:
        start: the right side of the first rule.
        rules: right sides of others, by name; terminals are in capitals.
        parts: rules that are JSON, by name.
        where: see `Grammar`.
    """
    lines = [f"start: {start}"]
    lines += [f"{name}: {right}" for name, right in rules.items()]
    lines += [f"{name}: %json {part.json}" for name, part in parts.items()]
    return Grammar("\n".join([_OPTIONS, *lines, ""]), tuple(parts.values()), where)


def json_grammar(part: HeldJson) -> Grammar:
    """The grammar of JSON alone."""
    return make_grammar("json", {}, {"json": part}, part.where)


def literal(*texts: str) -> str:
    """These texts one behind the other, as one terminal."""
    return json.dumps("".join(texts), ensure_ascii=False)
