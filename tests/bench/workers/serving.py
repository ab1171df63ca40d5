"""Our server as a process that tells what it cost: `qwen-aot serve` with the engine's run calls counted apart.

    python -m tests.bench.workers.serving BUNDLE --port 8000 --threads 1

BUNDLE may have random weights and no tokenizer: each token is then a word of letters. `fake` is an engine that spells
letters and computes nothing. A line on standard input is answered by one on standard output: a JSON object of CPU
seconds, of the process (`cpu`) and of those in the engine's run calls on the thread that makes them (`run`), which is
all of them where the engine has one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from qwen_aot.runtime.backends.ort import step
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.server.event_loop import run
from qwen_aot.runtime.server.lifecycle import Lifecycle, bind
from qwen_aot.runtime.server.settings import ServerSettings
from qwen_aot.runtime.server.state import Model
from qwen_aot.runtime.text.detokenizer import byte_of_character
from qwen_aot.runtime.text.tokenizer import Tokenizer
from tests.bench.workers.protocol import READY
from tests.runtime.server.servers import make_generator

FAKE = "fake"
FAKE_ROWS, FAKE_CONTEXT = 16, 4096


def spelling_tokenizer(vocab_size: int) -> Tokenizer:
    """Bytes, which texts become, and for each other id a word of letters, which only a model says."""
    vocabulary = dict(byte_of_character())
    for token_id in range(len(vocabulary), vocab_size):
        word, rest = "", token_id
        while rest:
            rest, letter = divmod(rest, 26)
            word += chr(ord("a") + letter)
        vocabulary[f"Ġ{word}."] = token_id
    made = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return Tokenizer(made, {}, vocab_size=vocab_size)


def opened(bundle: str, threads: int | None) -> Generator:
    """The bundle's generator, with a tokenizer."""
    if bundle == FAKE:
        return make_generator(rows=FAKE_ROWS, max_context=FAKE_CONTEXT)[0]
    generator = Generator.open(Path(bundle), threads=threads)
    generator.engine.reserve(generator.engine.manifest.max_context)
    if generator.tokenizer is not None:
        return generator
    engine = generator.engine
    return Generator(engine, spelling_tokenizer(engine.manifest.model.vocab_size), generator.defaults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a bundle's folder, or fake")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=None, help="of the engine")
    arguments = parser.parse_args()
    # What a step calls the time of its run call is the CPU time of its thread instead.
    setattr(step, "time", SimpleNamespace(perf_counter=time.thread_time))  # noqa: B010  mypy knows it as a module
    generator = opened(arguments.bundle, arguments.threads)

    def told(model: Model) -> None:
        print(READY, flush=True)
        threading.Thread(target=tell, daemon=True).start()

    def tell() -> None:
        for _ in sys.stdin:
            print(json.dumps({"cpu": time.process_time(), "run": generator.engine.run_seconds}), flush=True)

    settings = ServerSettings(port=arguments.port, model_names=("model",), grace_seconds=0)
    with bind(settings) as listener:
        return run(Lifecycle(settings, listener, lambda: generator, told).run())


if __name__ == "__main__":
    sys.exit(main())
