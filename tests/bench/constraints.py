"""What holding answers to a schema costs: a vocabulary's load, a schema's compilation, and masks, token by token.

    python -m tests.bench.constraints --tiktoken qwen.tiktoken

The ranks are Qwen's published ones (the package `dashscope` carries them as `resources/qwen.tiktoken`); without them
the vocabulary is made up. A walk writes a text that fits its schema, in the longest tokens, as a model that is held to
it would; each round is a fresh matcher. Times are of one thread's CPU.
"""

from __future__ import annotations

import argparse
import base64
import resource
import statistics
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from qwen_aot.runtime.generation.constraint import HeldOutput
from qwen_aot.runtime.server.constraints.compiler import GrammarCompiler
from qwen_aot.runtime.server.constraints.grammar import ANY_OBJECT, Grammar, HeldJson, json_grammar
from qwen_aot.runtime.server.tool_fields import read_offer
from qwen_aot.runtime.server.tool_formats.call_grammar import call_grammar
from qwen_aot.runtime.server.tool_formats.hermes import Hermes
from qwen_aot.runtime.text.detokenizer import byte_of_character
from qwen_aot.runtime.text.token_bytes import TokenBytes
from qwen_aot.runtime.text.tokenizer import Tokenizer

VOCAB_SIZE = 151_936

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 40},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
ADA = (
    '{"name": "Ada Lovelace of London", "age": 36, "tags": ["a", "c"], '
    '"address": {"street": "12 St James Square, London", "zip": "12345"}}'
)
CALL = '<tool_call>\n{"name": "f17", "arguments": {"city": "London", "days": 3}}\n</tool_call>'


def vocabulary(ranks: Path | None) -> Tokenizer:
    """Byte-level tokens without merges: what a text is split into is of no interest here, what tokens say is."""
    if ranks is None:
        rng = np.random.default_rng(0)
        tokens = {bytes([byte]) for byte in range(256)}
        while len(tokens) < 151_643:
            tokens.add(bytes(rng.integers(97, 123, rng.integers(2, 12)).astype(np.uint8)))
        ordered = sorted(tokens)
    else:
        ordered = [base64.b64decode(line.split()[0]) for line in ranks.read_text().splitlines()]
    spelled = {byte: character for character, byte in byte_of_character().items()}
    ids = {"".join(spelled[byte] for byte in token): number for number, token in enumerate(ordered)}
    backend = RustTokenizer(models.BPE(vocab=ids, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, {}, vocab_size=VOCAB_SIZE)


def split(text: str, tokens: dict[bytes, int]) -> list[int]:
    """The longest token each time."""
    data, ids = text.encode(), []
    while data:
        length = next(n for n in range(min(len(data), 40), 0, -1) if data[:n] in tokens)
        ids.append(tokens[data[:length]])
        data = data[length:]
    return ids


def tools() -> Grammar:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    }
    functions = [{"function": {"name": f"f{n}", "strict": True, "parameters": parameters}} for n in range(20)]
    offer = read_offer({"tools": functions})
    assert offer is not None
    grammar = call_grammar(Hermes.syntax, offer, None)
    assert grammar is not None
    return grammar


def walk(compiler: GrammarCompiler, grammar: Grammar, ids: list[int], rounds: int) -> tuple[float, list[float]]:
    """Seconds of a compilation (the least), and of each token: mask, its use on a row of logits, acceptance."""
    compilations, times = [], []
    logits = np.random.default_rng(0).standard_normal(VOCAB_SIZE).astype(np.float32)
    row = np.empty_like(logits)
    for _ in range(rounds):
        began = time.thread_time()
        compiled = compiler.compile(grammar)
        compilations.append(time.thread_time() - began)
        held = HeldOutput(compiled, {151_643, 151_645})
        for token_id in ids:
            np.copyto(row, logits)
            began = time.thread_time()
            assert held.hold(row)
            assert row[token_id] > -np.inf, token_id
            held.accept(token_id)
            times.append(time.thread_time() - began)
    return min(compilations), times


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiktoken", type=Path, help="ranks of Qwen's tokenizer")
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    tokenizer = vocabulary(given.tiktoken)
    before = resident()
    began = time.thread_time()
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    megabytes = (resident() - before) / 1e6
    print(f"vocabulary of {VOCAB_SIZE}: {time.thread_time() - began:.2f} s, {megabytes:.0f} MB")
    known = TokenBytes(tokenizer)
    tokens = {known.of(token_id): token_id for token_id in range(151_643)}
    text = "I'll look that up for you, one moment please. " * 3
    cases = {
        "any object": (json_grammar(HeldJson(ANY_OBJECT, "schema")), ADA),
        "an object of a schema": (json_grammar(HeldJson(PERSON, "schema")), ADA),
        "text before a call of 20 strict functions": (tools(), text),
        "a call of one of 20 strict functions": (tools(), CALL),
    }
    print(f"{'':44} compile ms  tokens  us a token: median   p99   max")
    for name, (grammar, said) in cases.items():
        ids = split(said, tokens)
        compilation, times = walk(compiler, grammar, ids, given.rounds)
        us = sorted(1e6 * each for each in times)
        p99, most = us[int(0.99 * len(us))], us[-1]
        print(
            f"{name:44} {1e3 * compilation:10.1f}  {len(ids):6}  {statistics.median(us):18.0f} {p99:6.0f} {most:5.0f}"
        )


if __name__ == "__main__":
    main()
