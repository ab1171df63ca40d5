"""How fast the C library opens a tokenizer and encodes text, beside the `tokenizers` library.

    python -m tests.bench.capi_text tokenizer.json docs/architecture.md
    python -m tests.bench.capi_text --tiktoken qwen.tiktoken docs/architecture.md

The second makes Qwen's tokenizer.json of its published ranks first (the package `dashscope` carries them as
`resources/qwen.tiktoken`). Times are CPU seconds of one thread, the least of several rounds that alternate between the
two; a file is repeated up to a megabyte, and cut into lines for neither.
"""

from __future__ import annotations

import argparse
import base64
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from qwen_aot.engines.bundle.compiled_tokenizer import compile_tokenizer
from qwen_aot.exporter.checkpoint.bpe import byte_level_bpe
from qwen_aot.runtime.text.detokenizer import byte_of_character
from tests.runtime.capi.native import Native, ask

SIZE = 1_000_000  # bytes of a text
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OTHERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def qwen_tokenizer(ranks_file: Path) -> str:
    """tokenizer.json of a file of ranks: a line is a token's bytes in base64, and its rank, which is its id."""
    lines = ranks_file.read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    characters = {byte: character for character, byte in byte_of_character().items()}

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [tuple(map(spelled, _halves(token, ranks))) for token in sorted(ranks, key=ranks.__getitem__)]
    added = {
        len(ranks) + n: AddedToken(content, special=content in SPECIAL, normalized=False)
        for n, content in enumerate(SPECIAL + OTHERS)
    }
    vocab = {spelled(token): rank for token, rank in ranks.items()}
    pairs = [(merge[0], merge[1]) for merge in merges if len(merge) == 2]
    return byte_level_bpe(vocab, pairs, pre="qwen2", added=added).to_str()


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that the merges before a token's own leave of it; a byte has none."""
    parts = [token[n : n + 1] for n in range(len(token))]
    while len(parts) > 2:
        _, place = min((ranks.get(parts[n] + parts[n + 1], len(ranks)), n) for n in range(len(parts) - 1))
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def texts(files: Sequence[Path]) -> dict[str, str]:
    """What is encoded: the files, and the scripts that take other paths."""
    found = {path.name: path.read_text(encoding="utf-8") for path in files}
    found |= {
        "Chinese": "通义千问是阿里云研发的大语言模型，可以回答问题、创作文字。",
        "combining marks": "naïve café हिन्दी ไทย العَرَبِيَّة ".replace("é", "e\u0301"),
        "one letter": "a",
    }
    return {name: text * (SIZE // len(text.encode()) + 1) for name, text in found.items()}


def main(arguments: Sequence[str]) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiktoken", type=Path, help="ranks to make the tokenizer of, in place of tokenizer.json")
    parser.add_argument("files", nargs="+", type=Path, help="tokenizer.json (without --tiktoken), then texts")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    files = list(given.files)
    document = qwen_tokenizer(given.tiktoken) if given.tiktoken else files.pop(0).read_text(encoding="utf-8")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.process_time()
    tokenizer = RustTokenizer.from_str(document)
    opened = time.process_time() - started
    started = time.process_time()
    table = compile_tokenizer(document, vocab_size=1 << 20)
    print(f"compiled in {time.process_time() - started:.2f} s of CPU: {len(table)} bytes of {len(document.encode())}")
    with tempfile.TemporaryDirectory() as folder:
        program = Native(Path(folder)).program("tokenizer")
        path = Path(folder) / "tokenizer.qtok"
        path.write_bytes(table)
        rows = []
        for name, text in texts(files).items():
            ours = theirs = opening = float("inf")
            for _ in range(given.rounds):
                ((opens, seconds, count),) = ask(
                    program, [{"do": "measure", "table": 0, "text": text, "runs": 1}], path
                )
                started = time.process_time()
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                theirs = min(theirs, time.process_time() - started)
                ours, opening = min(ours, seconds), min(opening, opens)
                if len(ids) != count:
                    sys.exit(f"{name}: {count} ids, and {len(ids)} by the library")
            megabytes = len(text.encode()) / 1e6
            rows.append(f"| {name} | {megabytes / ours:.1f} | {megabytes / theirs:.1f} | {theirs / ours:.0f} |")
    print(f"opened in {opening * 1e3:.2f} ms of CPU; by the library in {opened * 1e3:.0f} ms\n")
    print("| text | MB/s | by the library | times |\n| --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
