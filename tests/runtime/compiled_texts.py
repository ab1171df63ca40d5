"""Tokenizers of tests, and what their compiled form is told against."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle.compiled_tokenizer import compile_tokenizer
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from tests.gguf_files import smollm2_path
from tests.runtime.texts import GOLDEN

VOCAB_SIZE = 200_000
TOKENIZATION: dict[str, Any] = json.loads((GOLDEN / "tokenization.json").read_text(encoding="utf-8"))
GOLDEN_NAMES = ("gpt2", "qwen2", "smollm2")


@functools.cache
def tokenizer_json(name: str) -> str:
    """One of the golden ones; "many": with added tokens of every kind that is compiled; "real": SmolLM2's own."""
    if name == "gpt2":
        return (GOLDEN / "tokenizer.json").read_text(encoding="utf-8")
    if name == "many":
        return with_many_added_tokens().to_str()
    if name == "real":
        path = smollm2_path()
        assert path is not None
        with open_checkpoint(path) as checkpoint:
            return checkpoint.tokenizer.files["tokenizer.json"]
    text: str = TOKENIZATION["tokenizers"][name]
    return text


def names() -> list[str]:
    """All of them; the real one where its file is."""
    return [*GOLDEN_NAMES, "many", *(["real"] if smollm2_path() is not None else [])]


def with_many_added_tokens() -> RustTokenizer:
    """Tokens that begin, overlap and hold each other, some looked for in text as it stands, some in normalized text."""
    tokenizer = RustTokenizer.from_str(tokenizer_json("qwen2"))
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False) for text in ("<|im_s", "<|im_e", "<|im_end|><|im_end|>")]
    )
    tokenizer.add_tokens(
        [
            *(AddedToken(text, normalized=False) for text in ("|>|", "im_end|>x", "  ", "\n\n", "ab~")),
            *(AddedToken(text, normalized=True) for text in ("éé", "ab~c", "b~cd", "你好")),
        ]
    )
    return tokenizer


@functools.cache
def reference(name: str) -> RustTokenizer:
    """The `tokenizers` library's."""
    tokenizer = RustTokenizer.from_str(tokenizer_json(name))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@functools.cache
def compiled(name: str) -> bytes:
    """The content of tokenizer.qtok."""
    return compile_tokenizer(tokenizer_json(name), vocab_size=VOCAB_SIZE)


def write_compiled(folder: Path, name: str) -> Path:
    """The file of it."""
    path = folder / f"{name}.qtok"
    path.write_bytes(compiled(name))
    return path
