"""Stop ids and warnings of whole checkpoints: as a folder and as GGUF, a model ends its answers at the same tokens."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qwen_aot.engines.bundle.text_facts import text_facts
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TokenizerFiles
from qwen_aot.exporter.checkpoint.gguf.config import stop_ids
from qwen_aot.exporter.checkpoint.gguf.tokenizer import tokenizer_files
from qwen_aot.exporter.checkpoint.hf.config import parse
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from qwen_aot.exporter.model.config import ModelConfig
from tests.chat_templates import CHATML, PUBLISHED
from tests.checkpoints import SPECIAL_TOKENS, save_tokenizer, tiny_config

VOCAB = 320
# A fine-tune's own mark: no list of known ends has it.
MARKED = CHATML.replace("<|im_end|>", "<|im_start|>")


@dataclass(frozen=True)
class Source:
    """What `text_facts` reads of a checkpoint."""

    config: ModelConfig
    tokenizer: TokenizerFiles
    name: str = "some-model"


def config_with(*eos: int) -> ModelConfig:
    raw = tiny_config(vocab=VOCAB).to_dict()
    return parse(raw | {"eos_token_id": list(eos)}, {})


def folder(path: Path, eos: str, template: str, **files: Any) -> Source:
    """A folder's text files, whose configurations name one end."""
    ids = save_tokenizer(path, VOCAB)
    document = {"eos_token": eos, "chat_template": template} | files.pop("tokenizer_config", {})
    (path / "tokenizer_config.json").write_text(json.dumps(document))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return Source(config_with(ids[eos]), read_tokenizer_files(path, vocab_size=VOCAB))


def as_gguf(path: Path, eos: str, template: str) -> Source:
    """The same as a converter writes it."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.get_vocab_size())]
    end = tokens.index(eos)
    metadata = {
        "general.architecture": "qwen2",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.chat_template": template,
    }
    return Source(config_with(*stop_ids(metadata)), tokenizer_files(metadata, vocab_size=VOCAB))


@pytest.mark.parametrize("template", [CHATML, MARKED, PUBLISHED["llama2"], PUBLISHED["alpaca"]])
@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|im_end|>"])
def test_a_folder_and_its_gguf_file_end_answers_at_the_same_tokens(eos: str, template: str, tmp_path: Path) -> None:
    ours = text_facts(folder(tmp_path, eos, template))  # type: ignore[arg-type]
    other = text_facts(as_gguf(tmp_path, eos, template))  # type: ignore[arg-type]
    assert set(ours.eos_token_ids) == set(other.eos_token_ids)
    assert len(ours.eos_token_ids) == len(set(ours.eos_token_ids))


@pytest.mark.parametrize("make", [folder, lambda path, *rest: folder(path, *rest) and as_gguf(path, *rest)])
def test_a_fine_tune_whose_configurations_name_the_base_models_end_stops_at_its_own(make: Any, tmp_path: Path) -> None:
    found = text_facts(make(tmp_path, "<|endoftext|>", MARKED))
    base, mark = VOCAB - 3, VOCAB - 2
    assert found.eos_token_ids[:1] == (base,)
    assert mark in found.eos_token_ids
    assert found.warnings == ()


def test_the_special_map_and_the_configuration_may_name_different_ends(tmp_path: Path) -> None:
    named = folder(
        tmp_path,
        "<|endoftext|>",
        PUBLISHED["alpaca"],
        tokenizer_config={"added_tokens_decoder": {}, "eos_token": None},
        special_tokens_map={"eos_token": "<|im_start|>"},
    )
    assert VOCAB - 2 in text_facts(named).eos_token_ids  # type: ignore[arg-type]


def test_warnings_are_logged_and_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = text_facts(folder(tmp_path, "<|endoftext|>", "{{ sep_token }}" + CHATML))  # type: ignore[arg-type]
    (warning,) = found.warnings
    assert "writes sep_token, which nothing defines" in warning
    assert warning in caplog.text


def test_a_special_token_of_another_file_is_defined(tmp_path: Path) -> None:
    source = folder(
        tmp_path, "<|endoftext|>", "{{ sep_token }}" + CHATML, special_tokens_map={"sep_token": "<|im_start|>"}
    )
    assert text_facts(source).warnings == ()  # type: ignore[arg-type]


def test_a_template_that_cannot_be_parsed_stops_the_build(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"chat template can't be used: .*line 1"):
        text_facts(folder(tmp_path, "<|endoftext|>", "{% if %}"))  # type: ignore[arg-type]


def test_without_a_tokenizer() -> None:
    found = text_facts(Source(config_with(7), TokenizerFiles()))  # type: ignore[arg-type]
    assert found.eos_token_ids == (7,)
    assert found.warnings[0].startswith("some-model has no tokenizer.json: the bundle takes and gives token ids only")


def test_without_a_template(tmp_path: Path) -> None:
    source = folder(tmp_path, "<|im_end|>", "")
    files = dict(source.tokenizer.files) | {"tokenizer_config.json": "{}"}
    found = text_facts(Source(source.config, TokenizerFiles(files)))  # type: ignore[arg-type]
    assert set(found.eos_token_ids) == {VOCAB - 1, VOCAB - 3}
    assert found.warnings == ()
