"""Which of a folder's files the chat template is taken from: the one that transformers takes it from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qwen_aot.exporter.checkpoint.hf.template_files import read_templates
from tests.checkpoints import save_tokenizer, tiny_config

FILES: dict[str, dict[str, Any]] = {
    "none": {},
    "config": {"tokenizer_config.json": {"chat_template": "A"}},
    "named": {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "A"}]}},
    "file": {"chat_template.jinja": "B"},
    "file above config": {"tokenizer_config.json": {"chat_template": "A"}, "chat_template.jinja": "B\r\nb"},
    "file and others": {"chat_template.jinja": "B", "additional_chat_templates/tool_use.jinja": "T"},
    "others above config": {
        "tokenizer_config.json": {"chat_template": "A"},
        "additional_chat_templates/rag.jinja": "R",
        "additional_chat_templates/notes.txt": "N",
    },
    "processor beside config": {
        "tokenizer_config.json": {"chat_template": "A"},
        "chat_template.json": {"chat_template": "P"},
    },
}


def write(folder: Path, files: dict[str, Any]) -> object:
    """Writes the files; returns tokenizer_config.json's template."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), newline="")
    return files.get("tokenizer_config.json", {}).get("chat_template")


@pytest.mark.parametrize("case", FILES)
def test_the_template_is_transformers(case: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 300)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    found = read_templates(tmp_path, write(tmp_path, FILES[case]))
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    assert found == AutoTokenizer.from_pretrained(tmp_path).chat_template


def test_a_processors_template_where_there_is_no_other(tmp_path: Path) -> None:
    assert read_templates(tmp_path, write(tmp_path, {"chat_template.json": {"chat_template": "P"}})) == "P"
