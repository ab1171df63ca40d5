"""What the C library takes beside the Python runtime and its peers, and how it stands to its bars.

    python -m tests.bench.capi [--bundle BUNDLE] [--tiktoken qwen.tiktoken] [--prefix PREFIX] [--text FILE]
        [--genai PYTHON:MODEL] [--llama-cpp PREFIX:MODEL.gguf]

Two models: the bundle that is given (int8 of SmolLM2, say), and one of two narrow layers with Qwen's vocabulary of
151,936, where what is done for a token outside of the engine can be seen; its logits are spread as a trained model's.
With `--tiktoken` (the package `dashscope` carries it as `resources/qwen.tiktoken`) that one has Qwen's tokenizer, and
texts are encoded. The library is built as users build it, or taken from a prefix. Peers run the bundle's model in a
format of theirs, by C programs too: onnxruntime-genai by the library in the packages of a Python, llama.cpp by what its
CMake installs.

Every line is a process of its own, all in turn, round after round; shown are the lowest of the rounds, for
tokens per second the highest. CPU time is that of one thread: the caller's, which ONNX Runtime's run call is taken out
of. The engine's peak of memory is what a Python process grows by with the session and its cache alone, its libraries
loaded; the C library's what its process grows by. In both, the pages of ONNX Runtime's own file have been read before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from tokenizers import Tokenizer

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.runtime.bundle.load import load_bundle
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

COMPILER = ("gcc", "-O2", "-std=gnu99", "-Wall", "-Wextra", "-Werror")

Row = dict[str, Any]
Counts = tuple[int, int, int]  # threads, tokens of the prompt, new tokens


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
    """The library, and the programs that run it and its peers; each answers with a line."""

    def __init__(self, folder: Path, prefix: Path | None) -> None:
        """Builds what is missing."""
        prefix = prefix or folder / "prefix"
        if not (prefix / "lib").exists():
            install_library(prefix)
        self._folder = folder
        self.library = (prefix / "lib" / "libqwen_aot.so").resolve()
        self.engine = folder / "libtimed_onnxruntime.so"
        run([*COMPILER, "-shared", "-fPIC", SOURCES / "timed_onnxruntime.c", "-o", self.engine, "-ldl"])
        self.program = self._compile("capi", prefix, "-lqwen_aot", "-ldl")

    def _compile(self, name: str, prefix: Path | None, *libraries: str) -> Path:
        found = [] if prefix is None else [f"-I{prefix / 'include'}", f"-L{prefix / 'lib'}"]
        found += [] if prefix is None else [f"-Wl,-rpath,{prefix / 'lib'}"]
        run([*COMPILER, *found, SOURCES / f"{name}.c", "-o", self._folder / name, *libraries])
        return self._folder / name

    def c(self, bundle: Path, counts: Counts, setting: str, text: Path | str = "") -> Row:
        """The C library."""
        threads, *tokens = map(str, counts)
        environment = os.environ | {"TIMED_ONNXRUNTIME": str(engine_library())}
        command = [str(self.program), str(bundle), str(self.engine), threads, *tokens, setting, str(text)]
        return answer(command, environment)

    @staticmethod
    def python(bundle: Path, counts: Counts, setting: str) -> Row:
        """The Python runtime."""
        command = [sys.executable, "-m", "tests.bench.workers.capi_python", str(bundle), *map(str, counts), setting]
        return answer(command, dict(os.environ))

    def genai(self, given: str, vocab_size: int, text: Path | str) -> Callable[[Counts], Row]:
        """onnxruntime-genai: given PYTHON:MODEL."""
        python, _, model = given.partition(":")
        where = "import onnxruntime, onnxruntime_genai as g; print(onnxruntime.__file__, g.__file__, sep='\\n')"
        done = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
        runtime, peer = (Path(line).parent for line in done.stdout.split())
        engine = next((runtime / "capi").glob("libonnxruntime.so.*"))
        beside = self._folder / "genai-library"  # by the name that it looks for
        beside.mkdir()
        (beside / "libonnxruntime.so.1").symlink_to(engine)
        (beside / "libonnxruntime.so").symlink_to(engine)
        program = self._compile("genai", None, "-ldl")
        environment = os.environ | {"LD_LIBRARY_PATH": str(beside)}
        library = peer / "libonnxruntime-genai.so"

        def measure(counts: Counts) -> Row:
            return answer([program, model, library, *counts, vocab_size, text], environment)

        return measure

    def llama_cpp(self, given: str, text: Path | str) -> Callable[[Counts], Row]:
        """llama.cpp: given PREFIX:MODEL.gguf."""
        prefix, _, model = given.partition(":")
        program = self._compile("llama_cpp", Path(prefix).resolve(), "-lllama", "-lggml", "-lggml-base")
        return lambda counts: answer([program, model, *counts, text], dict(os.environ))


def answer(arguments: Sequence[object], environment: dict[str, str]) -> Row:
    """The line that a process writes."""
    command = [str(each) for each in arguments]
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


def rounds_of(contenders: Sequence[Callable[[], Row]], rounds: int) -> list[Row]:
    """The best of each, all in turn."""
    rows: list[list[Row]] = [[] for _ in contenders]
    for _ in range(rounds):
        for found, measure in zip(rows, contenders, strict=True):
            found.append(measure())
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


def token_table(programs: Programs, wide: Path, threads: int, rounds: int) -> None:
    """A token outside of the run call."""
    print("| a token outside of the run call, µs of CPU | C library (lowest token) | Python | bar |")
    print("| --- | --- | --- | --- |")
    counts = (threads, 16, 40)
    for setting in SETTINGS:
        both = (partial(programs.c, wide, counts, setting), partial(programs.python, wide, counts, setting))
        ours, python = rounds_of(both, rounds)
        bar = BARS["greedy" if setting == "greedy" else "sampled"]
        own = f"{ours['own_us']:.0f} ({ours['own_us_lowest']:.0f})"
        print(f"| {setting} | {own} | {python['own_us']:.0f} | {bar} |", flush=True)
    print(f"\nopened but for the engine: {ours['own_open_ms']:.1f} ms of CPU (bar {BARS['open']})", flush=True)


def encoding(programs: Programs, bundle: Path, text: Path, rounds: int) -> None:
    """Beside Hugging Face's library."""
    ours = best([programs.c(bundle, (1, 4, 3), "greedy", text) for _ in range(rounds)])
    opens, speed, count = encode_by_tokenizers(bundle, text.read_text(encoding="utf-8"))
    if count != ours["encoded"]:
        sys.exit(f"{ours['encoded']} ids, and {count} by tokenizers")
    print(f"encode: {ours['encode_mb_s']:.1f} MB/s (bar {BARS['encode']}); tokenizers: {speed:.1f}, ", end="")
    print(f"opened in {opens:.0f} ms", flush=True)


def model_table(programs: Programs, given: argparse.Namespace, text: Path) -> None:
    """Whole models: speed, memory, and the time to open."""
    bundle, counts = given.bundle, (given.threads, 256, 32)
    measured: dict[str, Callable[[], Row]] = {
        "C library": partial(programs.c, bundle, counts, "greedy", text),
        "Python": partial(programs.python, bundle, counts, "greedy"),
        "Python's session and cache alone": partial(programs.python, bundle, counts, "engine"),
    }
    if given.genai:
        vocab_size = load_bundle(bundle).manifest.model.vocab_size
        measured["onnxruntime-genai's C API"] = partial(programs.genai(given.genai, vocab_size, text), counts)
    if given.llama_cpp:
        measured["llama.cpp's C API"] = partial(programs.llama_cpp(given.llama_cpp, text), counts)
    rows = dict(zip(measured, rounds_of(list(measured.values()), given.rounds), strict=True))
    ours = rows["C library"]
    ours["open_ms"] = ours["own_open_ms"] + ours["engine_open_ms"]
    columns = {
        "prefill, tokens/s": lambda row: f"{row['prefill']:.1f}",
        "decode, tokens/s": lambda row: f"{row['decode']:.1f}",
        "open, ms of CPU": lambda row: f"{row['open_ms'] + row.get('tokenizer_open_ms', 0):.0f}",
        "encode, MB/s": lambda row: f"{row['encode_mb_s']:.1f}",
        "peak of the process, MiB": lambda row: f"{row['peak_kb'] / 1024:.0f}",
        "grown by, MiB": lambda row: f"{(row['peak_kb'] - row['engine_kb']) / 1024:.0f}",
    }
    print(f"\n| | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name, row in rows.items():
        cells = []
        for show in columns.values():
            try:
                cells.append(show(row))
            except KeyError:
                cells.append("")
        print(f"| {name} | {' | '.join(cells)} |")
    engine = rows["Python's session and cache alone"]
    bar = (engine["peak_kb"] - engine["engine_kb"]) / 1024 + BARS["memory"]
    print(f"\nof the open, {ours['own_open_ms']:.1f} ms are not the engine's; bar of what it grows by: {bar:.0f} MiB")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="for speed and memory")
    parser.add_argument("--wide", type=Path, help="a bundle of Qwen's vocabulary, in place of the one that is made")
    parser.add_argument("--tiktoken", type=Path, help="ranks of Qwen's tokenizer")
    parser.add_argument("--prefix", type=Path, help="where the library is installed")
    parser.add_argument("--text", type=Path, default=Path("docs/architecture.md"), help="what is encoded")
    parser.add_argument(
        "--genai", metavar="PYTHON:MODEL", help="a Python that has onnxruntime-genai, its model's folder"
    )
    parser.add_argument("--llama-cpp", metavar="PREFIX:MODEL.gguf", help="where llama.cpp is installed, its model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = Programs(folder, given.prefix)
        wide = given.wide or wide_bundle(folder, given.tiktoken)
        print(f"library: {programs.library.stat().st_size / 1024:.0f} KiB (bar {BARS['size']})\n")
        token_table(programs, wide, given.threads, given.rounds)
        content = given.text.read_text(encoding="utf-8")
        text = folder / "text"
        text.write_text(content * (1_000_000 // len(content.encode()) + 1), encoding="utf-8")
        if (wide / "tokenizer.qtok").exists():
            encoding(programs, wide, text, given.rounds)
        if given.bundle is not None:
            model_table(programs, given, text)


if __name__ == "__main__":
    main()
