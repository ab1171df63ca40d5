from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2Tokenizer

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TokenizerFiles
from qwen_aot.exporter.checkpoint.gguf.config import stop_ids
from qwen_aot.exporter.checkpoint.gguf.tokenizer import tokenizer_files
from tests.checkpoints import CHATML, SPECIAL_TOKENS, save_tokenizer
from tests.exporter.checkpoint.hf.test_tokenizer import TEXTS

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """As a converter writes Qwen's: special tokens and padding behind the vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, 400)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    size = len(tokens)
    return {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *SPECIAL_TOKENS, "<tool>", "[PAD1]"],
        "tokenizer.ggml.token_type": [NORMAL] * size + [CONTROL] * 3 + [USER_DEFINED, UNUSED],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": size,
        "tokenizer.ggml.bos_token_id": size,
        "tokenizer.ggml.padding_token_id": size,
        "tokenizer.chat_template": CHATML,
    }


def read(metadata: dict[str, Any]) -> TokenizerFiles:
    return tokenizer_files(metadata, vocab_size=400)


def load(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(read(metadata).files["tokenizer.json"])


def test_qwen_tokens_are_those_of_transformers(metadata: dict[str, Any]) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    reference = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    reference.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    ours = load(metadata)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == reference.encode(text)
        assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids)


def test_special_and_added_tokens_are_whole(metadata: dict[str, Any]) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    tokenizer = load(metadata)
    for token in (*SPECIAL_TOKENS, "<tool>"):
        assert tokenizer.encode(f"x{token}y").ids[1] == tokens.index(token)
    ids = tokenizer.encode("a<|im_end|><tool>").ids
    assert tokenizer.decode(ids) == "a<tool>"  # control tokens are special, user-defined ones are text
    assert tokenizer.get_vocab_size() == len(tokens)


def test_files(metadata: dict[str, Any]) -> None:
    files = read(metadata).files
    tokens = metadata["tokenizer.ggml.tokens"]
    config = json.loads(files["tokenizer_config.json"])
    assert config["chat_template"] == CHATML
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|endoftext|>",) * 3
    assert not config["add_bos_token"]
    end = tokens.index("<|endoftext|>")
    assert json.loads(files["generation_config.json"]) == {
        "bos_token_id": end,
        "eos_token_id": [end],
        "pad_token_id": end,
    }


def test_stop_ids() -> None:
    base = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.tokens": ["a", "b", "<|im_end|>"]}
    assert stop_ids({}) == ()
    assert stop_ids(base) == (1,)
    assert stop_ids(base | {"tokenizer.ggml.eot_token_id": 2}) == (1, 2)
    assert stop_ids(base | {"tokenizer.ggml.eom_token_id": 2, "tokenizer.ggml.eot_token_id": 0}) == (1, 0, 2)
    assert stop_ids(base | {"tokenizer.ggml.eot_token_id": 1}) == (1,)


def test_every_named_token_is_in_the_configuration(metadata: dict[str, Any]) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {"unknown": 0, "seperator": 1, "cls": 2, "mask": 3}
    found = read(metadata | {f"tokenizer.ggml.{kind}_token_id": index for kind, index in ids.items()})
    config = json.loads(found.files["tokenizer_config.json"])
    assert [config[f"{name}_token"] for name in ("unk", "sep", "cls", "mask")] == tokens[:4]
    assert found.end_tokens == ("<|endoftext|>",)


def test_named_templates(metadata: dict[str, Any]) -> None:
    config = json.loads(
        read(metadata | {"tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_templates": ["tool_use"]}).files[
            "tokenizer_config.json"
        ]
    )
    assert config["chat_template"] == [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "tools"},
    ]


def test_a_start_token_is_added_where_the_file_says_so(metadata: dict[str, Any]) -> None:
    end = metadata["tokenizer.ggml.tokens"].index("<|endoftext|>")
    tokenizer = load(metadata | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("a").ids[0] == end
    assert tokenizer.encode("a", add_special_tokens=False).ids == load(metadata).encode("a").ids


def test_old_qwen_files_do_not_name_the_pre_tokenizer(
    metadata: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    old = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.pre"}
    with caplog.at_level(logging.INFO):
        assert read(old).files == read(metadata).files
    assert "using qwen2" in caplog.text
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre is None; not supported"):
        read(old | {"general.architecture": "llama"})


def test_smollm_cuts_digits_and_keeps_contractions(metadata: dict[str, Any], tmp_path: Path) -> None:
    pieces = load(metadata | {"tokenizer.ggml.pre": "smollm"}).pre_tokenizer.pre_tokenize_str("it's 1234, ok")
    assert [piece for piece, _ in pieces] == ["it", "'s", "Ġ", "1", "2", "3", "4", ",", "Ġok"]


def test_no_tokenizer() -> None:
    assert read({"general.architecture": "qwen2"}).files == {}


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, "model is 'llama'; not supported; accepted: 'gpt2'"),
    "pre": ({"tokenizer.ggml.pre": "gemma"}, "pre is 'gemma'; not supported; accepted: qwen2, smollm"),
    "tokens": ({"tokenizer.ggml.tokens": 3}, r"tokenizer\.ggml\.tokens is missing or not a list of str"),
    "merges": ({"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing"),
    "merge": ({"tokenizer.ggml.merges": ["a"]}, "don't fit together"),
    "unknown merge": ({"tokenizer.ggml.merges": ["qq zz"]}, "don't fit together"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries for"),
    "twice": (
        {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]},
        "names 1 tokens twice",
    ),
    "eos": ({"tokenizer.ggml.eos_token_id": 100_000}, r"eos_token_id is 100000; accepted: 0 to"),
    "template": ({"tokenizer.chat_template": ["x"]}, "chat_template of type list; accepted: a text"),
    "eos text": ({"tokenizer.ggml.eos_token_id": "x"}, r"eos_token_id is 'x'; accepted: a whole number"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses_by_name(change: dict[str, Any], message: str, metadata: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(metadata | change)


def test_tokens_beyond_the_embedding_are_refused(metadata: dict[str, Any]) -> None:
    size = len(metadata["tokenizer.ggml.tokens"])
    assert tokenizer_files(metadata, vocab_size=size).files
    with pytest.raises(CheckpointError, match=f"tokens has ids to {size - 1}, but the model's .* before {size - 1}"):
        tokenizer_files(metadata, vocab_size=size - 1)
