"""Grammars asked about texts, and a small reading of JSON Schema that shares no code with what is tested."""

from __future__ import annotations

import functools
import re
from typing import Any

from qwen_aot.runtime.server.constraints.compiler import GrammarCompiler
from qwen_aot.runtime.server.constraints.grammar import Grammar, HeldJson, json_grammar
from tests.runtime.texts import byte_tokenizer

VOCABULARY = 300  # of `byte_tokenizer`: id n is byte n


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer(VOCABULARY), VOCABULARY)


def grammar_of(schema: Any) -> Grammar:
    return json_grammar(HeldJson(schema, "schema"))


def verdict(grammar: Grammar, text: str) -> str:
    """`whole`: it is one, and nothing may follow; `enough`: something may; `begun`: it is the start of one; `no`."""
    constraint = compiler().compile(grammar).start()
    for byte in text.encode():
        if constraint.mask()[byte] < 0:
            return "no"
        constraint.accept(byte)
    if not constraint.may_end:
        return "begun"
    return "whole" if constraint.is_finished else "enough"


def is_valid(value: Any, schema: Any) -> bool:
    """Of the keywords that the tests use."""
    kinds = {
        "string": str,
        "integer": int,
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool))):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(is_valid(value, each) for each in schema["anyOf"]):
        return False
    if isinstance(value, str):
        return (
            schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if isinstance(value, int):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, list):
        is_long = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9)
        return is_long and all(is_valid(each, schema.get("items", {})) for each in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        return (
            all(name in value for name in schema.get("required", ()))
            and (schema.get("additionalProperties", True) or set(value) <= set(known))
            and all(is_valid(each, known.get(name, {})) for name, each in value.items())
        )
    return True
