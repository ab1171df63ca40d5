"""Benchmark worker for llama.cpp: `PYTHON …/llama_cpp.py MODEL.gguf THREADS`, PYTHON having llama-cpp-python."""

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

_CONTEXT, _BATCH = 2048, 512  # tokens; llama.cpp's own default batch


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user_data: object) -> None:
    """Drops the library's log, which would stand between the benchmark's lines."""


def main(model_path: str, threads: str) -> None:
    """Greedy steps through the C API: neither its sampler nor the binding's copies are in the times."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp can't load {model_path}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = _CONTEXT, _BATCH, _BATCH
    options.n_threads = options.n_threads_batch = int(threads)
    context = llama_cpp.llama_init_from_model(model, options)
    memory = llama_cpp.llama_get_memory(context)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def likeliest(ids: list[int]) -> int:
        """The token behind these and all earlier ones."""
        for start in range(0, len(ids), _BATCH):
            chunk = ids[start : start + _BATCH]
            tokens = (llama_cpp.llama_token * len(chunk))(*chunk)
            if code := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(chunk))):
                raise RuntimeError(f"llama_decode returned {code}")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax())

    def measure(prompt: list[int], short_prompt: list[int], count: int) -> Measured:
        llama_cpp.llama_memory_clear(memory, True)
        start = time.perf_counter()
        likeliest(prompt)
        prefill_seconds = time.perf_counter() - start
        llama_cpp.llama_memory_clear(memory, True)
        token = likeliest(short_prompt)
        start = time.perf_counter()
        for _ in range(count):
            token = likeliest([token])
        return Measured(prefill_seconds, time.perf_counter() - start)

    serve(measure)


if __name__ == "__main__":
    main(*sys.argv[1:])
