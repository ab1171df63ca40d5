"""What a build says of a chat template, and that templates are rendered as transformers renders them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qwen_aot.engines.bundle.template_checks import check_others, check_template
from qwen_aot.errors import CheckpointError, GenerationError
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from qwen_aot.runtime.text.chat_template import ChatTemplate, template_tokens
from tests.chat_templates import CHATML, PUBLISHED, QWEN3
from tests.checkpoints import save_tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_are_fine(name: str) -> None:
    assert check_template(PUBLISHED[name], TOKENS).warnings == ()


@pytest.mark.parametrize(
    ("name", "tails"),
    [
        ("qwen1.5", ("<|im_end|>\n", "<|im_end|>\n<|im_start|>user\n")),
        ("qwen3", ("<|im_end|>\n", "<|im_end|>\n<|im_start|>user\n")),
        ("llama2", (" </s>", " </s><s>[INST] ")),
        ("mistral", ("</s> ", "</s> [INST] ")),
        ("alpaca", ("\n\n", "\n\n### Instruction:\n")),
    ],
)
def test_what_follows_an_answer(name: str, tails: tuple[str, ...]) -> None:
    assert check_template(PUBLISHED[name], TOKENS).tails == tails


def test_an_answer_that_needs_a_system_prompt_before_it() -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    facts = check_template(template, {})
    assert facts.tails[0] == "<|im_end|>\n"
    assert facts.warnings == (
        "the chat template refuses a single question: the chat template refuses these messages: no",
    )


def test_a_template_that_cannot_be_parsed_is_refused_with_its_line() -> None:
    with pytest.raises(CheckpointError, match=r"chat template can't be used: .*can't be parsed \(line 3: "):
        check_template("{% if x %}\n{{ 1 }}\n{% endfor %}", {})


def test_a_template_nested_beyond_the_compiler_is_refused() -> None:
    with pytest.raises(CheckpointError, match="chat template can't be used: "):
        check_template("{% for a in messages %}" * 300 + "{% endfor %}" * 300, {})


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ bos_token }}", "bos_token"),
        ("{{ date_string ~ bos_token }}", "bos_token, date_string"),
        ("{% for x in docs %}{% endfor %}", "docs"),
        ("{{ parts | length }}", "parts"),
        ("{% if messages[0].role == 'system' %}{{ only_there }}{% endif %}", "only_there"),
        ("{% if messages|length > 2 and messages[0].role == 'system' %}{{ deep }}{% endif %}", "deep"),
    ],
)
def test_a_name_that_nothing_defines_is_a_warning_with_the_name(template: str, names: str) -> None:
    warnings = check_template(template + CHATML, {}).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith(f"the chat template writes {names}, which nothing defines")


@pytest.mark.parametrize(
    "template",
    [
        "{% if tools %}x{% endif %}{{ documents or '' }}",
        "{% if enable_thinking is defined and enable_thinking is false %}x{% endif %}",
        "{% if custom_tools %}{{ custom_tools }}{% endif %}",
        "{{ date_string | default('today') }}",
        "{% if not date_string is defined %}{% set date_string = 'today' %}{% endif %}{{ date_string }}",
        "{{ messages[0].name }}{{ strftime_now('%Y') }}{{ eos_token }}{{ image_token }}",
    ],
)
def test_what_transformers_gives_or_a_template_only_asks_for_is_no_warning(template: str) -> None:
    assert check_template(template + CHATML, {"eos_token": "</s>", "image_token": "<i>"}).warnings == ()


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        ("{{ raise_exception('never') }}", "the chat template refuses a single question: .*: never"),
        ("{{ missing.attribute }}", "refuses a single question: .*'missing' is undefined"),
        (
            "{% if messages|length > 1 %}{{ raise_exception('once') }}{% endif %}" + CHATML,
            "refuses a second question: .*: once",
        ),
        ("nothing", r"leaves out what the user says \(a single question\)"),
        ("{{ messages[0].content }}", r"leaves out what the user says \(a second question\)"),
    ],
)
def test_a_template_that_refuses_or_loses_a_plain_conversation(template: str, warning: str) -> None:
    (found,) = check_template(template, {}).warnings
    assert re.search(warning, found), found


def test_a_template_may_drop_older_turns() -> None:
    assert check_template("{{ messages[-1].content }}", {}).warnings == ()


def test_other_named_templates() -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{% if %}"}]
    (warning,) = check_others(named, {})
    assert warning.startswith("the chat template 'tool_use' can't be used: ")
    assert "line 1" in warning
    assert check_others([named[0]], {}) == ()
    assert check_others(CHATML, {}) == ()
    (warning,) = check_others([{"name": "rag", "template": CHATML}], {})
    assert "are 'rag', and none is the default: the bundle can't chat" in warning


# What the checks render with is what transformers renders with, from a folder's own files.

SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "lstrip": False},
    "image_token": "<|endoftext|>",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ChatTemplate, Any]]:
    """Each published template in a folder of its own: ours and transformers' tokenizer of it."""
    found = {}
    for name, source in PUBLISHED.items():
        folder = tmp_path_factory.mktemp("chat")
        save_tokenizer(folder, 300)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
        (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL))
        document = json.loads(read_tokenizer_files(folder, vocab_size=300).files["tokenizer_config.json"])
        reference = PreTrainedTokenizerFast.from_pretrained(folder)
        found[name] = (ChatTemplate(document["chat_template"], template_tokens(document)), reference)
    return found


TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["a\r\nb", "<|im_end|>", "{{ x }}", " ä "])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT}),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=60)
@given(messages=MESSAGES, prompt=st.booleans())
def test_any_conversation_is_rendered_as_by_transformers(
    messages: list[dict[str, str]], prompt: bool, folders: dict[str, tuple[ChatTemplate, Any]]
) -> None:
    for name, (ours, reference) in folders.items():
        try:
            expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception:  # the template refuses the roles; jinja2's errors reach the caller
            with pytest.raises(GenerationError):
                ours.render(messages, add_generation_prompt=prompt)
            continue
        assert ours.render(messages, add_generation_prompt=prompt) == expected, name


def test_another_template_renders_otherwise(folders: dict[str, tuple[ChatTemplate, Any]]) -> None:
    """What the test above judges by can tell."""
    messages = [{"role": "user", "content": "x"}]
    expected = folders["qwen1.5"][1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(QWEN3, {}).render(messages) != expected
