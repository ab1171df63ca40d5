"""The chat format that generation_config.json names, against what the published `make_context` writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import jinja2
import pytest

from qwen_aot.exporter.checkpoint.hf import chat_format
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from tests.checkpoints import save_tokenizer


def make_context(system: str, history: list[tuple[str, str]], query: str) -> str:
    """Source: `make_context` of qwen_generation_utils.py, its `raw_text`."""
    start, end = "<|im_start|>", "<|im_end|>"
    text = f"{start}system\n{system}{end}"
    for asked, answered in history:
        text += f"\n{start}user\n{asked}{end}\n{start}assistant\n{answered}{end}"
    return f"{text}\n{start}user\n{query}{end}\n{start}assistant\n"


@pytest.mark.parametrize("history", [[], [("Hello", "Hi!")], [("1+1?", "2"), ("  spaced \n", "\nlines\n")]])
@pytest.mark.parametrize("system", [None, "You are a pirate.", ""])
def test_chatml_writes_what_the_published_code_writes(system, history):
    template = chat_format.read({"chat_format": "chatml"}, "it").template
    assert template is not None
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": "What now?"})
    wanted = make_context("You are a helpful assistant." if system is None else system, history, "What now?")
    rendered = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)  # as transformers does
    assert rendered.render(messages=messages, add_generation_prompt=True) == wanted


def test_answers_end_at_both_marks_of_a_turn():
    assert set(chat_format.read({"chat_format": "chatml"}, "it").end_tokens) == {"<|im_end|>", "<|im_start|>"}


@pytest.mark.parametrize("generation", [{}, {"chat_format": None}, {"chat_format": "raw"}])
def test_base_models_have_none(generation):
    assert chat_format.read(generation, "it") == chat_format.ChatFormat()


@pytest.mark.parametrize("name", ["llama", ["chatml"], {"chatml": 1}, 7])
def test_an_unknown_format_is_a_warning(caplog, name):
    with caplog.at_level(logging.WARNING):
        assert chat_format.read({"chat_format": name}, "it").template is None
    assert f"chat_format is {name!r}" in caplog.text and "chatml, raw" in caplog.text


def test_a_template_of_the_tokenizers_own_stands_above_it(tmp_path: Path):
    save_tokenizer(tmp_path, 400)
    (tmp_path / "generation_config.json").write_text('{"chat_format": "chatml"}')
    config_path = tmp_path / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"chat_template": "{{ messages[0]['content'] }}"}))
    found = read_tokenizer_files(tmp_path, vocab_size=500)
    assert json.loads(found.files["tokenizer_config.json"])["chat_template"] == "{{ messages[0]['content'] }}"
    assert {"<|im_end|>", "<|im_start|>"} <= set(found.end_tokens)
    config_path.write_text("{}")
    found = read_tokenizer_files(tmp_path, vocab_size=500)
    assert "<|im_start|>" in json.loads(found.files["tokenizer_config.json"])["chat_template"]
