from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2Tokenizer

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from tests.checkpoints import CHATML, SPECIAL_TOKENS, save_tokenizer

TEXTS = [
    "Hello, world! It's 2024; they'LL pay $1,234.56.",
    "  leading and   inner spaces\t\n\n\nlines \n",
    "你好，世界。Größe naïve café e\u0301 👍🏽 ﬁ",
    "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|endoftext|>",
    "",
]


def parts(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a small trained tokenizer."""
    save_tokenizer(folder, 400)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def write_old_files(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def added_tokens(folder: Path, vocab: dict[str, int], form: str) -> None:
    ids = {token: len(vocab) + number for number, token in enumerate(SPECIAL_TOKENS)}
    if form == "added_tokens.json":
        (folder / form).write_text(json.dumps(ids))
    else:
        decoder = {str(i): {"content": token, "special": True} for token, i in ids.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))


@pytest.mark.parametrize("form", ["added_tokens.json", "added_tokens_decoder"])
def test_vocab_and_merges_make_transformers_qwen_tokenizer(form: str, tmp_path: Path) -> None:
    vocab, merges = parts(tmp_path)
    write_old_files(tmp_path, vocab, merges)
    added_tokens(tmp_path, vocab, form)
    ours = Tokenizer.from_str(read_tokenizer_files(tmp_path, vocab_size=400).files["tokenizer.json"])
    reference = Qwen2Tokenizer(vocab=vocab, merges=merges)
    reference.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == reference.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids)


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=40))
def test_agrees_with_transformers_on_any_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab, merges = parts(folder)
    write_old_files(folder, vocab, merges)
    ours = Tokenizer.from_str(read_tokenizer_files(folder, vocab_size=400).files["tokenizer.json"])
    reference = Qwen2Tokenizer(vocab=vocab, merges=merges)
    assert ours.encode(text).ids == reference.encode(text)


def test_files_are_passed_on(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 300)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    files = read_tokenizer_files(tmp_path, vocab_size=400).files
    assert files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_text()
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == CHATML
    assert json.loads(files["generation_config.json"]) == {"temperature": 0.7}


def test_a_template_file_is_folded_in(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads(read_tokenizer_files(tmp_path, vocab_size=400).files["tokenizer_config.json"])
    assert config["chat_template"] == "{{ messages }}"
    assert config["eos_token"] == "<|im_end|>"


def test_no_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer_files(tmp_path, vocab_size=400).files == {}


def broken(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        path = folder / {"tokenizer": "tokenizer.json", "vocab": "vocab.json", "merges": "merges.txt"}.get(
            name, f"{name}.json"
        )
        path.write_bytes(content.encode() if isinstance(content, str) else content)


BROKEN = {
    "tokenizer": ({"tokenizer": "{}"}, "is not a tokenizer that can be loaded"),
    "panic": (  # tokenizers takes the prefix off the right part, which is shorter
        {
            "tokenizer": json.dumps(
                {
                    "version": "1.0",
                    "added_tokens": [],
                    "model": {
                        "type": "BPE",
                        "vocab": {"a": 0, "b": 1, "ab": 2},
                        "merges": ["a b"],
                        "continuing_subword_prefix": "##",
                    },
                }
            )
        },
        "is not a tokenizer that can be loaded",
    ),
    "encoding": ({"tokenizer": b"\xff"}, "is not UTF-8 text"),
    "config": ({"tokenizer_config": "{"}, "is not valid JSON"),
    "template": ({"tokenizer_config": '{"chat_template": 7}'}, "chat_template of type int; accepted: a text"),
    "templates": (
        {"tokenizer_config": '{"chat_template": [{"name": "default", "template": 1}]}'},
        "chat_template of type list; accepted: a text",
    ),
    "nan": ({"tokenizer_config": '{"x": NaN}'}, r"tokenizer_config\.json holds NaN or an infinity"),
    "infinity": ({"generation_config": '{"x": Infinity}'}, r"generation_config\.json holds NaN or an infinity"),
    "too large": ({"generation_config": '{"x": 1e999}'}, r"generation_config\.json holds NaN or an infinity"),
    "number": ({"generation_config": '{"top_p": "x"}'}, "top_p is 'x'; accepted: a number above 0, up to 1"),
    "range": (
        {"generation_config": '{"top_p": 7}'},
        r"top_p is 7; accepted: .*, up to 1 \(off\); repair it or take it",
    ),
    "greedy": ({"generation_config": '{"temperature": -1}'}, r"temperature is -1; accepted: a number: 0 \(greedy\) or"),
    "whole number": ({"generation_config": '{"top_k": 1.5}'}, "top_k is 1.5; accepted: a whole number of 0"),
    "truth": ({"generation_config": '{"max_new_tokens": true}'}, "max_new_tokens is True; accepted: a whole number"),
    "flag": ({"generation_config": '{"do_sample": 1}'}, "do_sample is 1; accepted: true or false"),
    "ids": ({"vocab": '{"a": 400}', "merges": ""}, "has ids to 400, but the model's vocabulary ends before 400"),
    "merge line": ({"vocab": "{}", "merges": "a b c"}, "has the line 'a b c'; accepted: two tokens"),
    "merge": ({"vocab": '{"a": 0}', "merges": "a b"}, "don't fit together"),
    "decoder": (
        {"vocab": '{"a": 0}', "merges": "", "tokenizer_config": '{"added_tokens_decoder": {"1": {}}}'},
        "added_tokens_decoder is damaged",
    ),
    "gap": (
        {
            "vocab": '{"a": 0}',
            "merges": "",
            "tokenizer_config": '{"added_tokens_decoder": {"7": {"content": "<x>"}}}',
        },
        "added token '<x>' should have id 7, the vocabulary gives it 1",
    ),
}


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    broken(tmp_path, **files)
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer_files(tmp_path, vocab_size=400)


def test_the_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 320)
    assert read_tokenizer_files(tmp_path, vocab_size=320).files
    with pytest.raises(CheckpointError, match="has ids to 319, but the model's vocabulary ends before 319"):
        read_tokenizer_files(tmp_path, vocab_size=319)
