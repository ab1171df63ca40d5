"""What of a client's schema is refused before it is compiled, by name."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.runtime.server.constraints.json_schema import check_schema
from qwen_aot.runtime.server.errors import ApiError


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth - 1):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        False,
        nested(32),
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}},
        {"properties": {"$ref": {"type": "string"}, "x-guidance": {}, "contains": {}}},  # names, and no keywords
        {"enum": [{"contains": 1, "$ref": "http://x"}], "default": {"not": 1}},  # values
        {"oneOf": [{}], "discriminator": {"propertyName": "kind", "mapping": {"a": "#/$defs/A"}}},
        {"anyOf": [{}], "discriminator": {"propertyName": "kind"}, "xml": {}, "externalDocs": {"url": "http://x"}},
        {"multipleOf": 1000},
        {"multipleOf": 0.01},
        {"multipleOf": 1e3},
        {"prefixItems": [{"multipleOf": 7}, True], "items": False},
    ],
)
def test_accepted(schema: Any) -> None:
    assert json.loads(check_schema(schema, "f")) == schema


@pytest.mark.parametrize(
    ("schema", "param", "said"),
    [
        (nested(33), "f", "more than 32 deep"),
        ({"const": nested(33)}, "f", "more than 32 deep"),
        ({"const": "x" * 65536}, "f", "65549 bytes"),
        ({"const": "\U0001f600" * 6000}, "f", "72013 bytes"),
        ({"propertes": {}}, "f.propertes", "did you mean properties"),
        ({"items": {"anyOf": [{}, {"contains": {}}]}}, "f.items.anyOf[1].contains", "leave it out"),
        ({"$defs": {"a": {"not": {}}}}, "f.$defs.a.not", "leave it out"),
        ({"additionalProperties": {"uniqueItems": True}}, "f.additionalProperties.uniqueItems", "leave it out"),
        ({"x-guidance": {"lenient": True}}, "f.x-guidance", "leave it out"),
        ({"$ref": "http://example.com/x"}, "f.$ref", "nothing is ever fetched"),
        ({"$ref": "file:///etc/passwd"}, "f.$ref", "nothing is ever fetched"),
        ({"discriminator": {"propertyName": "a"}}, "f.discriminator", "neither beside it"),
        ({"oneOf": [{}], "discriminator": "a"}, "f.discriminator", "an object with a propertyName"),
        ({"oneOf": [{}], "discriminator": {}}, "f.discriminator", "an object with a propertyName"),
        ({"oneOf": [{}], "discriminator": {"propertyName": "a", "x": 1}}, "f.discriminator", "with a propertyName"),
        (
            {"oneOf": [{}], "discriminator": {"propertyName": "a", "mapping": {"b": {}}}},
            "f.discriminator",
            "with a propertyName",
        ),
        ({"$ref": 5}, "f.$ref", "a place in the same schema"),
        ({"properties": {"a": 5}}, "f.properties.a", "an object, true or false"),
        ({"items": [{}]}, "f.items", "an object, true or false"),
        ({"multipleOf": 1001}, "f.multipleOf", "at most 1000 remainders"),
        ({"multipleOf": 1e300}, "f.multipleOf", "below"),
        ({"multipleOf": 1e-300}, "f.multipleOf", "at most 1000 remainders"),
        ({"multipleOf": 10**400}, "f.multipleOf", "below"),
        ({"multipleOf": 0}, "f.multipleOf", "above 0"),
        ({"multipleOf": -3}, "f.multipleOf", "above 0"),
        ({"multipleOf": True}, "f.multipleOf", "above 0"),
        ({"anyOf": [{"multipleOf": 999}] * 6}, "f.anyOf[5].multipleOf", "too many"),
    ],
)  # fmt: skip
def test_refused(schema: Any, param: str, said: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_schema(schema, "f")
    assert (caught.value.status, caught.value.param) == (400, param) and said in caught.value.message


def test_a_large_schema_is_refused_in_time() -> None:
    """4 MiB is what a body may have. Refusing takes some 0.1 s; walked once for each level it would take hours."""
    wide: Any = {"anyOf": [{"anyOf": [{"const": "x" * 20}] * 100}] * 900}
    began = time.process_time()
    with pytest.raises(ApiError, match="bytes of JSON schemas"):
        check_schema(wide, "f")
    assert time.process_time() - began < 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "items", "anyOf", "properties", "$ref", "multipleOf", "x", "enum"]), inner
        )
    ),
    max_leaves=20,
)


@given(schema=json_values)
def test_whatever_it_is_there_is_a_defined_answer(schema: Any) -> None:
    try:
        assert json.loads(check_schema(schema, "f")) == schema
    except ApiError as error:
        assert error.status == 400 and error.message and error.param
