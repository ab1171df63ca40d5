"""Templates: rendered as transformers renders them, in a sandbox, with what it hands in."""

import datetime
import json
import re

import pytest

from qwen_aot.errors import BundleError, GenerationError
from qwen_aot.runtime.text.chat_template import ChatTemplate, template_tokens
from tests.runtime.texts import GOLDEN

CASES = json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_golden(case: dict[str, object]) -> None:
    template = ChatTemplate(case["template"], case["special_tokens"])  # type: ignore[arg-type]
    rendered = template.render(
        case["messages"],  # type: ignore[arg-type]
        tools=case.get("tools"),  # type: ignore[arg-type]
        variables=case.get("variables"),  # type: ignore[arg-type]
        add_generation_prompt=case["add_generation_prompt"],  # type: ignore[arg-type]
    )
    assert rendered == case["text"]


def test_a_template_can_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(GenerationError, match="the chat template refuses these messages: roles must alternate"):
        template.render([])


def test_strftime_now() -> None:
    assert re.fullmatch(r"\d{4}-\d\d", ChatTemplate("{{ strftime_now('%Y-%m') }}", {}).render([]))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_a_template_is_kept_in_its_sandbox(source: str) -> None:
    with pytest.raises(GenerationError, match="refuses these messages"):
        ChatTemplate(source, {}).render([])


@pytest.mark.parametrize(
    "source",
    [
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 5 | xmlattr }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ strftime_now(5) }}",
        "{{ 'a' * 4611686018427387904 }}",  # no memory for it
    ],
)
def test_what_a_template_runs_into_is_a_refusal(source: str) -> None:
    with pytest.raises(GenerationError, match="the chat template refuses these messages: "):
        ChatTemplate(source, {}).render([])


def test_a_template_that_is_none() -> None:
    with pytest.raises(BundleError, match=r"can't be parsed \(line 1: .*\)"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
        "{% if a %}" * 200 + "{% endif %}" * 200,
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{{ messages" + "|list" * 5000 + " }}",
        "{{" + "9" * 5000 + "}}",
        "{% break %}",
        "{{ dict(a=1, a=2) }}",
    ],
    ids=["blocks", "indentation", "parentheses", "filters", "digits", "break", "keywords"],
)
def test_what_python_cannot_compile_is_no_template(source: str) -> None:
    with pytest.raises(BundleError, match=r"can't be compiled \(.+\); repair chat_template"):
        ChatTemplate(source, {})


def test_one_time_for_one_rendering() -> None:
    now = datetime.datetime(2024, 2, 29, 13, 5)
    template = ChatTemplate(
        "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() }}{{ strftime_now('%Z') }}"
    )
    assert template.render([], now=now) == "29 Feb 2024"  # without a time zone, as transformers' clock


def test_a_name_that_nobody_gives_is_empty() -> None:
    assert ChatTemplate("[{{ nothing }}{% if nothing %}!{% endif %}{{ nothing is defined }}]").render([]) == "[False]"


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(_x=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ dict.__class__.mro() }}",
        "{{ dict.mro() }}",
    ],
)
def test_helpers_give_nothing_of_python_away(source: str) -> None:
    with pytest.raises(GenerationError, match="refuses these messages"):
        ChatTemplate(source).render([])


def test_what_a_template_reads() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ image_token }}{% if tools and enable_thinking %}{{ documents }}{% endif %}"
        "{% for message in messages %}{{ raise_exception(range(3)) }}{{ strftime_now('x') }}{% endfor %}",
        {"image_token": "<image>"},
    )
    assert template.variables == {"enable_thinking", "documents"}
    assert template.takes_tools and "x" in template.literals
    assert not ChatTemplate("{{ messages }}").takes_tools


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        ("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", True),
        ("{{ messages[0].content }}", False),
        ("{{ 'user: ' + messages[0].content }}", False),
        ("{{ messages[0].content | trim }}", False),
        ("nothing", False),
    ],
)
def test_whether_a_template_reads_parts(source: str, takes: bool) -> None:
    assert ChatTemplate(source).takes_parts == takes


def test_tokens_that_a_template_gets() -> None:
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>", "lstrip": False},
        "add_bos_token": False,
        "cls_token": "[CLS]",
        "audio_token": "<audio>",
        "extra_special_tokens": {"image_token": "<image>"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "model_max_length": 5,
    }
    assert template_tokens(config) == {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "cls_token": "[CLS]",
        "audio_token": "<audio>",
        "image_token": "<image>",
        "additional_special_tokens": ["<a>", "<b>"],
    }
    assert template_tokens({"extra_special_tokens": ["<c>"]}) == {}
