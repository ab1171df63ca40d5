"""Tokenizers for tests, made from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from qwen_aot.runtime.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_tokenizer(config: dict[str, Any] | None = None, vocab_size: int = 1000) -> Tokenizer:
    """Byte-level BPE with few merges (tests/golden/make_detokenization.py)."""
    text = (GOLDEN / "tokenizer.json").read_text(encoding="utf-8")
    return Tokenizer(RustTokenizer.from_str(text), config or {}, vocab_size=vocab_size)


def byte_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """Byte-level without merges: id n is byte n, 256 is the special <|end|>."""
    alphabet = {character: byte for character, byte in _alphabet().items()}
    tokenizer = RustTokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return Tokenizer(tokenizer, {}, vocab_size=vocab_size)


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama's layout: a leading-space mark and <0xNN> tokens for bytes that have no piece."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Hello",
        "▁wor",
        "ld",
        "a",
        "é",
        ",",
        "你",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = RustTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return Tokenizer(tokenizer, {}, vocab_size=1000)


def _alphabet() -> dict[str, int]:
    """Each byte's character in a byte-level vocabulary, found by asking `tokenizers` itself."""
    probe = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = {}
    for code in range(0x800):  # one- and two-byte UTF-8: bytes 00-7F, 80-BF, C2-DF
        spelled = probe.pre_tokenize_str(chr(code))[0][0]
        found.update(zip(spelled, chr(code).encode(), strict=True))
    for text in ("\u0800", "\U00010000", "\ufffd", "\U00100000"):
        found.update(zip(probe.pre_tokenize_str(text)[0][0], text.encode(), strict=True))
    for lead in range(0xE1, 0xF0):
        text = bytes([lead, 0x80, 0x80]).decode("utf-8")
        found.update(zip(probe.pre_tokenize_str(text)[0][0], text.encode(), strict=True))
    for lead in range(0xF1, 0xF4):
        text = bytes([lead, 0x80, 0x80, 0x80]).decode("utf-8")
        found.update(zip(probe.pre_tokenize_str(text)[0][0], text.encode(), strict=True))
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(found))
    missing = sorted(set(range(256)) - set(found.values()))  # never in UTF-8; printable Latin-1, same order
    return found | dict(zip(rest, missing, strict=True))
