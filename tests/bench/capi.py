"""What the C library takes beside the Python runtime, and how it stands to its bars.

    python -m tests.bench.capi [--bundle BUNDLE] [--tiktoken qwen.tiktoken] [--prefix PREFIX] [--text FILE]

Two models: the bundle that is given (int8 of SmolLM2, say), and one of two narrow layers with Qwen's vocabulary of
151,936, where what is done for a token outside of the engine can be seen; its logits are spread as a trained model's.
With `--tiktoken` (the package `dashscope` carries it as `resources/qwen.tiktoken`) that one has Qwen's tokenizer, and
texts are encoded. The library is built as users build it, or taken from a prefix. onnxruntime-genai and llama.cpp are
measured by `tests.bench.compare`.

Every line is a process of its own, both runtimes in turn, round after round; shown are the lowest of the rounds, for
tokens per second the highest. CPU time is that of one thread: the caller's, which ONNX Runtime's run call is taken out
of. The engine's peak of memory is what a Python process grows by with the session and its cache alone, its libraries
loaded; the C library's what its process grows by, ONNX Runtime's file opened.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from tokenizers import Tokenizer

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.runtime.capi.build import install_library
from tests.bench.capi_text import qwen_tokenizer
from tests.checkpoints import quiet, save_tiny
from tests.runtime.capi.native import run

SOURCES = Path(__file__).parent / "src"
QWEN_VOCAB = 151_936
SPREAD = 4  # standard deviation of the logits
SETTINGS = ("greedy", "top_k", "top_p", "min_p", "temperature")
PER_SECOND = ("prefill", "decode", "encode_mb_s")  # more is better
BARS = {"greedy": 60, "sampled": 180, "open": 5, "encode": 10, "memory": 10, "size": 300}

Row = dict[str, Any]


def engine_library() -> Path:
    """The library that this Python's onnxruntime brings."""
    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


def wide_bundle(folder: Path, ranks: Path | None) -> Path:
    """Two layers of 64 with Qwen's vocabulary."""
    checkpoint = folder / "checkpoint"
    model = save_tiny(checkpoint, vocab=QWEN_VOCAB, tied=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(SPREAD)
    with quiet():
        model.save_pretrained(checkpoint)
    if ranks is not None:
        (checkpoint / "tokenizer.json").write_text(qwen_tokenizer(ranks), encoding="utf-8")
    build_bundle(checkpoint, BuildSpec(precision=Precision.FP32, max_context=512), folder / "wide")
    return folder / "wide"


class Programs:
    """The library and the programs that run it."""

    def __init__(self, folder: Path, prefix: Path | None) -> None:
        """Builds what is missing."""
        prefix = prefix or folder / "prefix"
        if not (prefix / "lib").exists():
            install_library(prefix)
        self.library = (prefix / "lib" / "libqwen_aot.so").resolve()
        self.engine = folder / "libtimed_onnxruntime.so"
        self.program = folder / "capi"
        compiler = ("gcc", "-O2", "-std=gnu99", "-Wall", "-Wextra", "-Werror")
        run([*compiler, "-shared", "-fPIC", SOURCES / "timed_onnxruntime.c", "-o", self.engine, "-ldl"])
        linked = [f"-L{prefix / 'lib'}", "-lqwen_aot", f"-Wl,-rpath,{prefix / 'lib'}", "-ldl"]
        run([*compiler, f"-I{prefix / 'include'}", SOURCES / "capi.c", "-o", self.program, *linked])

    def c(self, bundle: Path, counts: tuple[int, int, int], setting: str, text: Path | str = "") -> Row:
        """One process of the C library."""
        threads, *tokens = map(str, counts)
        environment = os.environ | {"TIMED_ONNXRUNTIME": str(engine_library())}
        command = [str(self.program), str(bundle), str(self.engine), threads, *tokens, setting, str(text)]
        return answer(command, environment)

    @staticmethod
    def python(bundle: Path, counts: tuple[int, int, int], setting: str) -> Row:
        """One process of the Python runtime."""
        command = [sys.executable, "-m", "tests.bench.workers.capi_python", str(bundle), *map(str, counts), setting]
        return answer(command, dict(os.environ))


def answer(command: list[str], environment: dict[str, str]) -> Row:
    """The line that a process writes."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def best(rows: list[Row]) -> Row:
    """The best of several rounds, number by number."""
    return {
        name: value if isinstance(value, str) else (max if name in PER_SECOND else min)(row[name] for row in rows)
        for name, value in rows[0].items()
    }


def rounds_of(programs: Programs, bundle: Path, counts: tuple[int, int, int], setting: str, rounds: int) -> list[Row]:
    """C and Python, in turn."""
    rows: tuple[list[Row], list[Row]] = ([], [])
    for _ in range(rounds):
        rows[0].append(programs.c(bundle, counts, setting))
        rows[1].append(programs.python(bundle, counts, setting))
    return [best(found) for found in rows]


def encode_by_tokenizers(bundle: Path, text: str) -> tuple[float, float, int]:
    """Milliseconds of CPU to open, MB/s, and ids: of Hugging Face's library, one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.process_time()
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    opened = time.process_time() - started
    taken, count = float("inf"), 0
    for _ in range(3):
        started = time.process_time()
        count = len(tokenizer.encode(text, add_special_tokens=False).ids)
        taken = min(taken, time.process_time() - started)
    return opened * 1e3, len(text.encode()) / taken / 1e6, count


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="for speed and memory")
    parser.add_argument("--wide", type=Path, help="a bundle of Qwen's vocabulary, in place of the one that is made")
    parser.add_argument("--tiktoken", type=Path, help="ranks of Qwen's tokenizer")
    parser.add_argument("--prefix", type=Path, help="where the library is installed")
    parser.add_argument("--text", type=Path, default=Path("docs/architecture.md"), help="what is encoded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = Programs(folder, given.prefix)
        wide = given.wide or wide_bundle(folder, given.tiktoken)
        print(f"library: {programs.library.stat().st_size / 1024:.0f} KiB (bar {BARS['size']})\n")
        print("| a token outside of the run call, µs of CPU | C library | Python | bar |\n| --- | --- | --- | --- |")
        for setting in SETTINGS:
            ours, python = rounds_of(programs, wide, (given.threads, 16, 40), setting, given.rounds)
            bar = BARS["greedy" if setting == "greedy" else "sampled"]
            print(f"| {setting} | {ours['own_us']:.0f} | {python['own_us']:.0f} | {bar} |", flush=True)
            opened = ours["own_open_ms"]
        print(f"\nopened but for the engine: {opened:.1f} ms of CPU (bar {BARS['open']})")
        if (wide / "tokenizer.qtok").exists():
            text = given.text.read_text(encoding="utf-8")
            text *= 1_000_000 // len(text.encode()) + 1
            (folder / "text").write_text(text, encoding="utf-8")
            ours = best([programs.c(wide, (1, 4, 3), "greedy", folder / "text") for _ in range(given.rounds)])
            opens, speed, count = encode_by_tokenizers(wide, text)
            if count != ours["encoded"]:
                sys.exit(f"{ours['encoded']} ids, and {count} by tokenizers")
            print(f"encode: {ours['encode_mb_s']:.1f} MB/s (bar {BARS['encode']}); tokenizers: {speed:.1f}, ", end="")
            print(f"opened in {opens:.0f} ms")
        if given.bundle is not None:
            counts = (given.threads, 256, 32)
            ours, python = rounds_of(programs, given.bundle, counts, "greedy", given.rounds)
            engine = best([programs.python(given.bundle, counts, "engine") for _ in range(given.rounds)])
            print("\n| | C library | Python |\n| --- | --- | --- |")
            for label, key in (("prefill, tokens/s", "prefill"), ("decode, tokens/s", "decode")):
                print(f"| {label} | {ours[key]:.1f} | {python[key]:.1f} |")
            opened = ours["own_open_ms"] + ours["engine_open_ms"]
            print(f"| open, ms of CPU | {opened:.0f}, of which {ours['own_open_ms']:.1f} not the engine's ", end="")
            print(f"| {python['open_ms']:.0f} |")
            print(f"| peak of the process, MiB | {ours['peak_kb'] / 1024:.0f} | {python['peak_kb'] / 1024:.0f} |")
            grown, bar = ((row["peak_kb"] - row["engine_kb"]) / 1024 for row in (ours, engine))
            print(f"| grown by, MiB | {grown:.0f} | {bar:.0f}: session and cache alone ", end="")
            print(f"(bar: {bar + BARS['memory']:.0f}) |")


if __name__ == "__main__":
    main()
