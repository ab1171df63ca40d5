"""Benchmark worker for llama.cpp: `PYTHON …/llama_cpp.py MODEL.gguf THREADS ROWS`, PYTHON having llama-cpp-python."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

# As in onnxruntime_genai.py: the peer's package first, then the protocol beside this file.
_HERE = str(Path(__file__).resolve().parent)
sys.path = [entry for entry in sys.path if entry != _HERE]

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402

sys.path.append(_HERE)
from protocol import Measured, serve  # noqa: E402

_CONTEXT, _BATCH = 4096, 512  # tokens: of a row; llama.cpp's own default batch


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: object) -> None:
    """Drops the library's log, which would stand between the benchmark's lines."""


def main(model_path: str, threads: str, rows: str) -> None:
    """Greedy steps through the C API: neither its sampler nor the binding's copies are in the times."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp can't load {model_path}")
    options = llama_cpp.llama_context_default_params()
    options.n_seq_max = int(rows)
    options.n_ctx, options.n_batch, options.n_ubatch = _CONTEXT * int(rows), _BATCH, _BATCH
    options.n_threads = options.n_threads_batch = int(threads)
    context = llama_cpp.llama_init_from_model(model, options)
    memory = llama_cpp.llama_get_memory(context)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def step(tokens: list[tuple[int, int, int, bool]]) -> None:
        """One call for these (row, position, token, whether its logits are wanted)."""
        batch.n_tokens = len(tokens)
        for place, (row, position, token, has_logits) in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, has_logits
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def likeliest(place: int) -> int:
        """The token behind this one of the last step's."""
        logits = llama_cpp.llama_get_logits_ith(context, place)
        return int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax())

    def start(row: int, ids: list[int]) -> int:
        """The token behind a prompt of a row that holds nothing."""
        for begin in range(0, len(ids), _BATCH):
            chunk = ids[begin : begin + _BATCH]
            step([(row, begin + at, token, begin + at + 1 == len(ids)) for at, token in enumerate(chunk)])
        return likeliest(-1)

    def measure(prompt: list[int], short_prompts: list[list[int]], count: int) -> Measured:
        llama_cpp.llama_memory_clear(memory, True)
        begun = time.perf_counter()
        start(0, prompt)
        prefill_seconds = time.perf_counter() - begun
        llama_cpp.llama_memory_clear(memory, True)
        tokens = [start(row, ids) for row, ids in enumerate(short_prompts)]
        begun = time.perf_counter()
        for position in range(len(short_prompts[0]), len(short_prompts[0]) + count):
            step([(row, position, token, True) for row, token in enumerate(tokens)])
            tokens = [likeliest(row) for row in range(len(tokens))]
        return Measured(prefill_seconds, time.perf_counter() - begun)

    serve(measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
