"""What the runtime refuses in a bundle's text files must be refused before a bundle is built of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_aot.errors import BundleError, CheckpointError
from qwen_aot.exporter.checkpoint.tokenizer_checks import GENERATION_VALUES, check_generation, check_template
from qwen_aot.runtime.generation.config import GenerationDefaults
from qwen_aot.runtime.text.tokenizer import _read_template

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 2),
    st.floats(allow_nan=False),
    st.floats(-0.1, 1.1),
    st.sampled_from([0, 0.0009, 0.001, 1, 1000, 1000.1]),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["name", "template"]), st.one_of(st.text(max_size=3), st.integers())),
)


def refuses(check: Any, *arguments: Any) -> bool:
    try:
        check(*arguments)
    except (BundleError, CheckpointError):
        return True
    return False


@example({"top_p": 7})
@example({"top_p": 0})
@example({"max_new_tokens": 0})
@example({"repetition_penalty": 0.0})
@given(st.dictionaries(st.sampled_from([*GENERATION_VALUES, "unknown"]), VALUES))
def test_both_sides_take_the_same_generation_config(document: dict[str, Any]) -> None:
    assert refuses(check_generation, document, "x") == refuses(GenerationDefaults.from_document, document)


@given(st.one_of(VALUES, st.lists(VALUES, max_size=3)))
def test_a_template_that_passes_here_passes_there(template: object) -> None:
    assert refuses(check_template, template, "x") or not refuses(_read_template, template)


@pytest.mark.parametrize("template", [None, "x", [{"name": "default", "template": "x"}]])
def test_templates_that_pass(template: object) -> None:
    check_template(template, "x")
