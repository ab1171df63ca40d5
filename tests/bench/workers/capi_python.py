"""What the Python runtime takes, beside tests/bench/src/capi.c: one line of JSON.

    python -m tests.bench.workers.capi_python BUNDLE THREADS PROMPT_TOKENS NEW_TOKENS SETTING

SETTING: as there, or "engine": the session and its cache alone, of which the peak of memory counts.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.request import Completion

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_k": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "top_p": {"temperature": 0.7, "top_k": 0, "top_p": 0.95},
    "min_p": {"temperature": 0.7, "top_k": 0, "min_p": 0.1},
    "temperature": {"temperature": 0.7, "top_k": 0},
}
ROUNDS = 3
MADV_POPULATE_READ = 22  # Linux 5.14

_run_seconds = 0.0  # CPU seconds of the calling thread in the engine's run calls


class TimedSession(onnxruntime.InferenceSession):  # type: ignore[misc]
    """A session that notes the CPU time of its runs."""

    def run_with_iobinding(self, *arguments: Any, **named: Any) -> Any:
        global _run_seconds
        started = time.thread_time()
        super().run_with_iobinding(*arguments, **named)
        _run_seconds += time.thread_time() - started


def memory(name: str) -> int:
    """A number of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def read_pages(library: str) -> None:
    """As in measured.h: so that pages of the engine's own file aren't counted."""
    process = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        place, rights, *_ = line.split()
        if library in line and rights.startswith("r-"):
            start, end = (int(number, 16) for number in place.split("-"))
            process.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_READ)


def prompt(count: int, vocab_size: int) -> list[int]:
    """The same ids as the C program's."""
    return [(i * 7919 + 17) % (vocab_size // 2) for i in range(count)]


def engine_memory(bundle: Path, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Peak of the engine alone, over what the process had with its libraries loaded."""
    onnxruntime.get_available_providers()
    read_pages("onnxruntime")
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    engine = OnnxRuntimeEngine(load_bundle(bundle), OrtOptions(threads=threads))
    ids = prompt(prompt_tokens, engine.manifest.model.vocab_size)
    token = int(engine.prefill(0, np.array(ids, np.int64)).argmax())
    for _ in range(new_tokens - 1):
        token = int(engine.decode(0, np.array([token], np.int64))[0].argmax())
    return {"engine_kb": before, "peak_kb": memory("VmHWM")}


def generation(bundle: Path, threads: int, prompt_tokens: int, new_tokens: int, setting: str) -> dict[str, Any]:
    """Speeds, and CPU time outside of the engine."""
    onnxruntime.InferenceSession = TimedSession
    read_pages("onnxruntime")
    before = memory("VmRSS")
    started = time.process_time()
    generator = Generator.open(bundle, threads=threads)
    opened = time.process_time() - started
    ids = prompt(prompt_tokens, generator.engine.manifest.model.vocab_size)
    own, prefill, decode = list[float](), 0.0, 0.0
    for _ in range(ROUNDS):
        settings = {**SETTINGS[setting], "max_new_tokens": new_tokens, "ignore_eos": True, "seed": 1}
        marks: list[float] = []
        for event in generator.stream([ids], **settings):
            marks.append(time.thread_time() - _run_seconds)
            if isinstance(event, Completion):
                prefill = max(prefill, prompt_tokens / event.timings.prefill)
                decode = max(decode, (new_tokens - 1) / event.timings.decode)
        own += [b - a for a, b in itertools.pairwise(marks[1:-1])]
    return {
        "open_ms": opened * 1e3,
        "prefill": prefill,
        "decode": decode,
        "own_us": statistics.median(own) * 1e6,
        "own_us_lowest": min(own) * 1e6,
        "engine_kb": before,
        "peak_kb": memory("VmHWM"),
    }


def main(bundle: str, threads: str, prompt_tokens: str, new_tokens: str, setting: str) -> None:
    """Prints the line."""
    counts = (int(threads), int(prompt_tokens), int(new_tokens))
    found = engine_memory(Path(bundle), *counts) if setting == "engine" else generation(Path(bundle), *counts, setting)
    print(json.dumps(found | {"setting": setting}))


if __name__ == "__main__":
    main(*sys.argv[1:])
