"""Compiled grammars: what they allow, what can't be compiled and why, and outputs from random logits."""

from __future__ import annotations

import functools
import json
from typing import Any

import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from qwen_aot.errors import ConstraintError
from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from qwen_aot.runtime.generation.request import Completion, FinishReason, Request
from qwen_aot.runtime.server.constraints.compiler import GrammarCompiler, GrammarError
from qwen_aot.runtime.server.constraints.grammar import ANY_OBJECT, MAX_WHITESPACE, HeldJson, make_grammar
from qwen_aot.runtime.server.constraints.json_schema import check_schema
from qwen_aot.runtime.server.errors import ApiError
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.runtime.fakes import FakeEngine
from tests.runtime.server.constraints.languages import VOCABULARY, compiler, grammar_of, is_valid, verdict
from tests.runtime.texts import byte_tokenizer, sentencepiece_tokenizer
from tests.runtime.toys import make_manifest

END = 256


def allowed(constraint: Any) -> set[int]:
    mask = constraint.mask()
    assert set(mask.tolist()) <= {0, -np.inf}
    return set(np.flatnonzero(mask == 0).tolist())


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
# As Pydantic writes a union that a field tells.
PETS = {
    "$defs": {
        name: {
            "type": "object",
            "properties": {"kind": {"const": name.lower()}, **own},
            "required": ["kind", *own],
            "additionalProperties": False,
        }
        for name, own in (("Cat", {"lives": {"type": "integer"}}), ("Dog", {"name": {"type": "string"}}))
    },
    "discriminator": {"mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}, "propertyName": "kind"},
    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
}
CIRCLE = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}


@pytest.mark.parametrize(
    ("schema", "text", "found"),
    [
        (ANY_OBJECT, '{"a": [1, {"b": null}]}', "whole"),
        (ANY_OBJECT, "[1]", "no"),
        (ANY_OBJECT, '{"a"', "begun"),
        (True, "12", "enough"),
        (PERSON, '{"name": "Ö\\n\\"", "age": 5}', "whole"),
        (PERSON, '{"age": 5', "no"),
        (PERSON, '{"name": "x", "age": -', "no"),
        (PERSON, '{"name": "x", "other"', "no"),
        ({"enum": ["a\u2028é😀", {"a": [1.5]}]}, '"a\u2028é😀"', "whole"),
        ({"const": "\u0000"}, '"\\u0000"', "whole"),
        ({"type": "string", "pattern": "^a/b$"}, '"a/b"', "whole"),
        (PETS, '{"kind": "dog", "name": "x"}', "whole"),
        (PETS, '{"kind": "dog", "lives"', "no"),
        (PETS, '{"kind": "cow"', "no"),
        (CIRCLE, "[[],[[]]]", "whole"),
        ({"type": "integer", "multipleOf": 7}, "21", "enough"),
        ({"type": "integer", "multipleOf": 7}, "20", "begun"),
        (ANY_OBJECT, "{" + " " * MAX_WHITESPACE + "}", "whole"),
        (ANY_OBJECT, "{" + " " * (MAX_WHITESPACE + 1), "no"),
        (ANY_OBJECT, " ", "no"),
    ],
)  # fmt: skip
def test_what_is_allowed(schema: Any, text: str, found: str) -> None:
    assert verdict(grammar_of(schema), text) == found


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (False, "false"),
        ({"enum": []}, "empty"),
        ({"type": "foo"}, "Invalid type"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(a)\\1"}, "backreferences"),
        ({"type": "string", "format": "idn-email"}, "Unknown format"),
        ({"oneOf": [{"type": "object"}, {"type": "object"}]}, "oneOf"),
        ({"oneOf": [{"type": "object"}] * 2, "discriminator": {"propertyName": "kind"}}, "oneOf"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible types"),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"$ref": "#"}, "no text fits it"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no text fits it"),
        ({"const": 10**400}, "number out of range"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "object", "properties": {f"p{n}": {} for n in range(2300)}}, "2000"),
    ],
)  # fmt: skip
def test_what_can_not_be_compiled(schema: Any, said: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler().compile(grammar_of(schema))
    assert caught.value.where == "schema" and said in caught.value.reason
    assert "start:" not in caught.value.reason and len(caught.value.reason) <= 200


def test_a_schema_that_is_at_fault_is_named_among_others() -> None:
    parts = {"a": HeldJson(ANY_OBJECT, "first"), "b": HeldJson({"type": "foo"}, "second")}
    with pytest.raises(GrammarError) as caught:
        compiler().compile(make_grammar("a b", {}, parts, "both"))
    assert caught.value.where == "second"


def test_each_copy_goes_its_own_way() -> None:
    compiled = compiler().compile(grammar_of({"enum": ["a", "b"]}))
    first, second = compiled.start(), compiled.start()
    for byte in b'"a':
        first.accept(byte)
    second.accept(ord('"'))
    assert ord("b") in allowed(second) and ord("b") not in allowed(first)


def test_a_token_that_is_not_allowed_is_an_error_and_stays_one() -> None:
    constraint = compiler().compile(grammar_of(ANY_OBJECT)).start()
    with pytest.raises(ConstraintError, match="held to schema"):
        constraint.accept(ord("x"))
    with pytest.raises(ConstraintError):
        constraint.mask()


def test_a_grammar_that_takes_too_much_work_later_is_an_error_and_no_freedom() -> None:
    """What llguidance says then is that the text may end: that must not be believed."""
    many = {"type": "string", "enum": [f"v{n}" for n in range(3000)], "pattern": "^v.*[02468]$"}
    late = {"type": "array", "prefixItems": [{"const": "for a beginning"}, many], "minItems": 2}
    constraint = compiler().compile(grammar_of(late)).start()
    with pytest.raises(ConstraintError, match="make it simpler"):
        for byte in b'["for a beginning","v2","v44","v1998"]' * 50:
            constraint.mask()
            constraint.accept(byte)


class Panic(BaseException):
    """As pyo3 raises one of Rust."""


@pytest.mark.parametrize("call", ["compute_bitmask", "consume_token"])
def test_a_panic_of_the_library_is_one_answers(call: str) -> None:
    constraint = compiler().compile(grammar_of(ANY_OBJECT)).start()

    class Broken:
        def __getattr__(self, name: str) -> Any:
            def panic(*given: Any) -> Any:
                raise Panic("at src/earley.rs")

            return panic

    constraint._matcher = Broken()  # type: ignore[assignment]
    with pytest.raises(ConstraintError, match="held to schema any more: llguidance failed with a Panic"):
        constraint.mask() if call == "compute_bitmask" else constraint.accept(123)


def test_a_panic_of_a_compilation_is_one_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*given: Any, **more: Any) -> Any:
        raise Panic("at src/earley.rs")

    made = compiler()
    monkeypatch.setattr(llguidance, "LLMatcher", panic)
    with pytest.raises(GrammarError, match="schema: llguidance failed with a Panic"):
        made.compile(grammar_of(ANY_OBJECT))


def test_no_special_token_and_no_padding_is_ever_allowed() -> None:
    constraint = compiler().compile(make_grammar("/(.|\\n)*/", {}, {}, "text")).start()
    assert constraint.mask().shape == (VOCABULARY,) and constraint.mask().dtype == np.float32
    assert allowed(constraint) >= set(range(128)) and max(allowed(constraint)) < 256


def test_where_a_text_may_end_and_go_on_no_token_says_so() -> None:
    """What ends an output is generation's business."""
    constraint = compiler().compile(grammar_of({"type": "integer"})).start()
    constraint.accept(ord("1"))
    assert constraint.may_end and not constraint.is_finished
    assert allowed(constraint) == set(b"0123456789")


def test_tokens_of_several_characters_and_of_their_spelling() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("<|im_end|>", special=True)])
    tokenizer = Tokenizer(tokenizer.backend, {}, vocab_size=VOCABULARY)
    grammar = make_grammar('"<tool_call>{"', {}, {}, "tools")
    constraint = GrammarCompiler(tokenizer, VOCABULARY).compile(grammar).start()
    assert allowed(constraint) == {ord("<"), 257}
    constraint.accept(257)
    assert allowed(constraint) == {ord("{")}


def test_sentencepiece() -> None:
    tokenizer = sentencepiece_tokenizer()
    pieces = tokenizer.backend.get_vocab()
    grammar = make_grammar('"a Hello"', {}, {}, "text")
    constraint = GrammarCompiler(tokenizer, 1000).compile(grammar).start()
    assert allowed(constraint) == {pieces["a"], pieces["<0x61>"]}
    constraint.accept(pieces["a"])
    assert pieces["▁Hello"] in allowed(constraint)


class RandomEngine(FakeEngine):
    """Random logits that a row's tokens decide; quotes and brackets come often, so that texts end."""

    def _logits(self, row: int) -> Any:
        seed = functools.reduce(lambda so_far, token_id: (31 * so_far + token_id + 7) % 2**31, self.rows[row], 0)
        logits = np.random.default_rng(seed).standard_normal(VOCABULARY).astype(np.float32)
        logits[[ord(letter) for letter in '"}]']] += 1
        return logits


def outputs(source: Any, n: int, **options: Any) -> list[Completion]:
    manifest = make_manifest(max_batch=3, max_context=1000, vocab_size=VOCABULARY, eos_token_ids=(END,))
    batch = Batch(RandomEngine(manifest), byte_tokenizer(), GenerationDefaults(eos_token_ids=(END,)))
    batch.add(Request([65], GenerationConfig(max_new_tokens=600, n=n, **options), constraint=source))
    found: list[Completion] = []
    while not batch.is_idle:
        found += [each for each in batch.step() if isinstance(each, Completion)]
    return found


leaves = st.one_of(
    st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 4)}),
    st.builds(
        lambda least, span: {"type": "integer", "minimum": least, "maximum": least + span},
        st.integers(-50, 50),
        st.integers(0, 99),
    ),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.lists(st.text(max_size=3) | st.integers(-9, 9) | st.none(), min_size=1, max_size=3).map(
        lambda each: {"enum": each}
    ),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(
            lambda items, most: {"type": "array", "items": items, "minItems": 1, "maxItems": most},
            inner,
            st.integers(1, 3),
        ),
        st.builds(
            lambda known, needed: {
                "type": "object",
                "properties": known,
                "required": sorted(known)[:needed],
                "additionalProperties": False,
            },
            st.dictionaries(st.text(max_size=3), inner, max_size=3),
            st.integers(0, 3),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda each: {"anyOf": each}),
    ),
    max_leaves=5,
)  # fmt: skip


def surrogates(value: Any) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in json.dumps(value, ensure_ascii=False))


@settings(max_examples=40)
@given(
    schema=schemas.filter(lambda schema: not surrogates(schema)),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 9),
)
def test_every_output_is_valid(schema: Any, temperature: float, seed: int) -> None:
    check_schema(schema, "f")
    completions = outputs(compiler().compile(grammar_of(schema)), 2, temperature=temperature, seed=seed)
    for completion in completions:
        assert completion.finish_reason is FinishReason.STOP, (completion.error, completion.text)
        assert completion.text is not None and is_valid(json.loads(completion.text), schema)


def test_without_the_constraint_no_output_is() -> None:
    """The negative control."""
    for completion in outputs(None, 2, temperature=1.0, seed=1):
        with pytest.raises(ValueError):
            json.loads(completion.text or "")


def hostile(number: int) -> Any:
    """A schema that wants much: many ways, long lists, large numbers, patterns in patterns, references in circles."""
    rng = np.random.default_rng(number)

    def integer(most: int) -> int:
        return int(10 ** rng.uniform(0, np.log10(most)))

    def properties(depth: int) -> Any:
        return {f"p{n}": make(depth) for n in range(integer(40 if depth > 0 else 400))}

    def patterns(depth: int) -> Any:
        return {f"^{'ab'[n % 2]}{n}.*": make(depth) for n in range(integer(20))}

    def make(depth: int) -> Any:
        multiple = float(rng.integers(1, 3000)) / 100
        kinds: list[Any] = [
            lambda: {"type": "string", "pattern": f"^((a|b){{1,{integer(2000)}}}c?){{{integer(50)},{integer(5000)}}}$"},
            lambda: {"type": "string", "pattern": f"\\p{{L}}{{{integer(3000)}}}", "maxLength": integer(10**9)},
            lambda: {"type": "string", "minLength": integer(10**6), "format": "date-time"},
            lambda: {"type": "string", "pattern": "".join(map(chr, rng.integers(32, 127, integer(60))))},
            lambda: {"enum": [f"{n}" for n in rng.integers(0, 10**9, integer(2000))]},
            lambda: {"type": "number", "multipleOf": multiple, "minimum": -(10.0 ** integer(300))},
            lambda: {"$ref": ["#", "#/anyOf/0", "#/$defs/a", "#x", "http://x"][int(rng.integers(5))]},
            lambda: {"type": "array", "items": make(depth - 1), "minItems": integer(10**9), "maxItems": integer(10**9)},
            lambda: {"type": "object", "properties": properties(depth - 1)},
            lambda: {"type": "object", "minProperties": integer(10**6), "additionalProperties": make(depth - 1)},
            lambda: {"type": "object", "patternProperties": patterns(depth - 1)},
            lambda: {["allOf", "anyOf", "oneOf"][int(rng.integers(3))]: [make(depth - 1) for _ in range(integer(12))]},
        ]  # fmt: skip
        return kinds[int(rng.integers(7 if depth <= 0 else len(kinds)))]()

    return make(3)


@pytest.mark.parametrize(
    "numbers",
    [range(40), *(pytest.param(range(start, start + 120), marks=pytest.mark.deep) for start in range(40, 1000, 120))],
    ids=lambda numbers: str(numbers.start),
)
def test_hostile_schemas_have_a_defined_end(numbers: range) -> None:
    """Refused, not compiled, or an output that is one or is cut: never one that isn't held."""
    ends: set[str] = set()
    for number in numbers:
        schema = hostile(number)
        try:
            check_schema(schema, "f")
            compiled = compiler().compile(grammar_of(schema))
        except (ApiError, GrammarError) as error:
            ends.add(type(error).__name__)
            continue
        manifest = make_manifest(max_batch=1, max_context=200, vocab_size=VOCABULARY, eos_token_ids=(END,))
        batch = Batch(RandomEngine(manifest), byte_tokenizer(), GenerationDefaults(eos_token_ids=(END,)))
        batch.add(Request([number % 256], GenerationConfig(max_new_tokens=40), constraint=compiled))
        while not batch.is_idle:
            for event in batch.step():
                if isinstance(event, Completion):
                    ends.add(event.finish_reason.value)
                    if event.finish_reason is FinishReason.STOP:
                        json.loads(event.text or "")
    assert {"ApiError", "GrammarError", "length"} <= ends  # else the schemas aren't what they are made for
