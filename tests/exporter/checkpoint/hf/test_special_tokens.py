"""Special and added tokens of a folder's files: what transformers makes of the same files is what a bundle says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.special_tokens import end_tokens, folded, special_tokens, text_of
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from qwen_aot.runtime.text.chat_template import template_tokens
from tests.checkpoints import save_tokenizer, tiny_config

START, END = "<|im_start|>", "<|im_end|>"
ADDED = {"__type": "AddedToken", "content": START}

FILES: dict[str, dict[str, Any]] = {
    "nothing": {"tokenizer_config": {}},
    "null": {"tokenizer_config": {"eos_token": None, "unk_token": None}},
    "the usual": {"tokenizer_config": {"eos_token": END, "pad_token": "<|endoftext|>", "add_bos_token": False}},
    "objects": {"tokenizer_config": {"eos_token": ADDED, "image_token": START}},
    "names of its own": {
        "tokenizer_config": {"eos_token": END, "image_token": START, "extra_special_tokens": {"boi": START}}
    },
    "special map": {
        "tokenizer_config": {"eos_token": END},
        "special_tokens_map": {
            "eos_token": "<|endoftext|>",
            "bos_token": {"content": START, "lstrip": False},
            "sep_token": END,
            "image_token": START,
        },
    },
    "special map beside added_tokens_decoder": {
        "tokenizer_config": {"eos_token": END, "added_tokens_decoder": {}},
        "special_tokens_map": {"eos_token": "<|endoftext|>", "bos_token": START},
    },
    "special map alone": {"special_tokens_map": {"eos_token": END, "cls_token": START, "mask_token": START}},
}


def write(folder: Path, files: dict[str, Any]) -> Path:
    save_tokenizer(folder, 320)
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(tiny_config(vocab=330).to_dict()))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("case", FILES)
def test_the_named_tokens_are_transformers(case: str, tmp_path: Path) -> None:
    write(tmp_path, FILES[case])
    config = json.loads(read_tokenizer_files(tmp_path, vocab_size=330).files["tokenizer_config.json"])
    assert template_tokens(config) == AutoTokenizer.from_pretrained(tmp_path).special_tokens_map


def test_the_lists_are_joined() -> None:
    config = {"additional_special_tokens": ["a"], "extra_special_tokens": {"boi": "b"}}
    found = folded(config, {"additional_special_tokens": ["a", {"content": "c"}]}, {})
    assert found["additional_special_tokens"] == ["a", "c"]
    assert found["extra_special_tokens"] == {"boi": "b"}
    assert config["additional_special_tokens"] == ["a"]  # not written into
    assert special_tokens(found, {"eos_token": {"content": "d"}}) == {"a", "b", "c", "d"}


def test_a_default_that_the_vocabulary_lacks_is_left_out() -> None:
    assert folded({}, {}, {"<|endoftext|>": 1})["eos_token"] == "<|endoftext|>"
    assert folded({}, {}, {}) == {}


def test_ends_are_those_of_all_files() -> None:
    assert end_tokens({"eos_token": "a"}, {"eos_token": {"content": "b"}}, {"eos_token": "a"}) == ("a", "b")
    assert end_tokens({"eos_token": None}, {}, {"eos_token": 7}) == ()
    assert text_of({"content": 3}) is None


def ids(files: dict[str, str], text: str) -> list[int]:
    return Tokenizer.from_str(files["tokenizer.json"]).encode(text).ids


@pytest.mark.parametrize("form", ["added_tokens", "tokenizer_config"])
def test_a_token_that_only_another_file_has_is_one_token(form: str, tmp_path: Path) -> None:
    tokens = {"<|endoftext|>": 317, START: 318, END: 319, "<|new|>": 320}
    content: dict[str, Any] = tokens
    if form == "tokenizer_config":
        content = {"added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in tokens.items()}}
    folder = write(tmp_path, {form: content})
    found = read_tokenizer_files(folder, vocab_size=330)
    text = f"a<|new|>b{START}"
    assert ids(dict(found.files), text) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert 320 in ids(dict(found.files), text)


def test_added_tokens_are_special_where_another_file_says_so(tmp_path: Path) -> None:
    more = {"<|new|>": 320, "<tool>": 321}
    named = write(tmp_path / "a", {"added_tokens": more, "special_tokens_map": {"sep_token": "<|new|>"}})
    theirs = AutoTokenizer.from_pretrained(named)
    ours = Tokenizer.from_str(read_tokenizer_files(named, vocab_size=330).files["tokenizer.json"])
    assert ours.decode([320, 321]) == theirs.decode([320, 321], skip_special_tokens=True) == "<tool>"
    unnamed = write(tmp_path / "b", {"added_tokens": more})
    ours = Tokenizer.from_str(read_tokenizer_files(unnamed, vocab_size=330).files["tokenizer.json"])
    assert ours.decode([320, 321]) == ""


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            {END: 318},
            f"tokenizer.json gives the token {END!r} the id 319, and tokenizer_config.json or added_tokens.json",
        ),
        (
            {"<|new|>": 325},
            "gives the token '<|new|>' the id 320, and tokenizer_config.json or added_tokens.json the id 325",
        ),
        ({"<|new|>": "x"}, "added_tokens.json is damaged; accepted: token -> id"),
        ({"<|new|>": -1}, "added_tokens.json is damaged"),
    ],
)
def test_files_of_different_models_are_refused(tokens: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {"added_tokens": tokens})
    with pytest.raises(CheckpointError) as caught:
        read_tokenizer_files(folder, vocab_size=330)
    assert message in str(caught.value)


def test_a_tokenizer_that_lacks_nothing_is_passed_on_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path, {"added_tokens": {END: 319}})
    assert (
        read_tokenizer_files(folder, vocab_size=330).files["tokenizer.json"] == (folder / "tokenizer.json").read_text()
    )
