"""An engine that other threads close or step: calls wait for each other, and none touches memory that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.engine.exclusive import Exclusive
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.request import Request, TokenEvent
from tests.runtime.toys import ALL_INPUTS, checksum, checksum_model, io_tables, make_manifest, write_bundle

SECONDS = 20.0  # that nothing here takes, unless it hangs


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    return write_bundle(tmp_path_factory.mktemp("b") / "checksum", checksum_model(inputs, outputs), manifest)


@pytest.fixture
def engine(bundle: Path) -> Iterator[OnnxRuntimeEngine]:
    with OnnxRuntimeEngine(load_bundle(bundle), OrtOptions(threads=1)) as engine:
        yield engine


class Gate:
    """Stops the thread that runs a step inside the library's run call until it is opened."""

    def __init__(self, engine: OnnxRuntimeEngine, kind: str) -> None:
        step = getattr(engine, f"_{kind}")
        self.reached, self.opened, self.runs = threading.Event(), threading.Event(), 0
        run = step._run

        def gated(binding: object) -> None:
            self.runs += 1
            self.reached.set()
            assert self.opened.wait(SECONDS)
            run(binding)

        step._run = gated


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Starts work; its result or error is appended to the list."""
    results: list[object] = []

    def body() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, results


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int64)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_close_waits_for_the_step_at_work(engine: OnnxRuntimeEngine, kind: str) -> None:
    engine.prefill(0, ids(1, 2))
    gate = Gate(engine, kind)
    step = (
        (lambda: engine.prefill(0, ids(3)).copy()) if kind == "prefill" else lambda: engine.decode(0, ids(3))[0].copy()
    )
    stepping, results = in_thread(step)
    assert gate.reached.wait(SECONDS)
    closing, _ = in_thread(engine.close)
    closing.join(0.1)
    assert closing.is_alive() and engine.session is not None and engine.cache.nbytes > 0
    gate.opened.set()
    for thread in (stepping, closing):
        thread.join(SECONDS)
        assert not thread.is_alive()
    (logits,) = results
    assert isinstance(logits, np.ndarray) and logits.argmax() == checksum([1, 2, 3])
    assert engine.session is None
    engine.close()  # again does nothing
    with pytest.raises(GenerationError, match="the engine is closed"):
        engine.decode(0, ids(1))


def test_close_ends_a_long_prompt_between_two_chunks(engine: OnnxRuntimeEngine) -> None:
    gate = Gate(engine, "prefill")
    stepping, results = in_thread(lambda: engine.prefill(0, np.ones(80, np.int64)))  # ten chunks
    assert gate.reached.wait(SECONDS)
    closing, _ = in_thread(engine.close)
    while not engine._is_closing:
        time.sleep(0.001)
    gate.opened.set()
    for thread in (stepping, closing):
        thread.join(SECONDS)
        assert not thread.is_alive()
    (error,) = results
    assert isinstance(error, GenerationError) and "closed before the end of a prompt" in str(error)
    assert gate.runs == 1


def test_a_step_begins_when_that_of_another_thread_has_ended(engine: OnnxRuntimeEngine) -> None:
    for row in (0, 1):
        engine.prefill(row, ids(row + 1))
    gate = Gate(engine, "decode")
    first, _ = in_thread(lambda: engine.decode(0, ids(3)))
    assert gate.reached.wait(SECONDS)
    second, _ = in_thread(lambda: engine.decode(1, ids(4)))
    second.join(0.1)
    assert (second.is_alive(), gate.runs) == (True, 1)
    gate.opened.set()
    for thread in (first, second):
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert (gate.runs, engine.cache_length.tolist()[:2]) == (2, [2, 2])


def test_closing_a_generator_while_it_streams(bundle: Path) -> None:
    for _ in range(5):
        generator = Generator.open(bundle, threads=1)
        started = threading.Event()

        def stream(generator: Generator = generator, started: threading.Event = started) -> None:
            for event in generator.stream([Request([n], GenerationConfig()) for n in range(1, 7)]):
                if isinstance(event, TokenEvent):
                    started.set()

        streaming, results = in_thread(stream)
        assert started.wait(SECONDS)
        generator.close()
        streaming.join(SECONDS)
        assert not streaming.is_alive()
        (error,) = results
        assert isinstance(error, GenerationError) and "the engine is closed" in str(error)


def test_closing_a_generator_from_a_signal_handler_in_a_step(bundle: Path) -> None:
    """The handler runs on the thread that is in the step, which can't wait for itself: closing waits for its end."""
    generator = Generator.open(bundle, threads=1)
    engine = generator.engine
    assert isinstance(engine, OnnxRuntimeEngine)
    step = engine._decode
    assert step is not None
    run = step._run

    def interrupted(binding: object) -> None:
        signal.raise_signal(signal.SIGUSR1)
        run(binding)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: generator.close())
    step._run = interrupted  # type: ignore[method-assign, assignment]
    try:
        events = generator.stream([Request([1, 2, 3], GenerationConfig(max_new_tokens=8))])
        assert isinstance(next(events), TokenEvent)  # of the prefill
        with pytest.raises(GenerationError, match="closed"):
            list(events)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert engine.session is None


def test_what_asks_again_within_a_step_is_refused() -> None:
    lock = Exclusive()
    done = []
    with lock:
        with pytest.raises(GenerationError, match="in a step on this very thread"), lock:
            pass
        lock.run(lambda: done.append("later"))
        assert done == []
    assert done == ["later"]
    lock.run(lambda: done.append("now"))
    assert done == ["later", "now"]


def test_one_of_many_threads_gets_the_stream(bundle: Path) -> None:
    with Generator.open(bundle, threads=1) as generator:
        barrier, held = threading.Barrier(8), threading.Event()

        def stream() -> str:
            events = generator.stream([Request([1], GenerationConfig(max_new_tokens=2))])
            barrier.wait(SECONDS)
            try:
                next(events)
            except GenerationError as error:
                return str(error)
            assert held.wait(SECONDS)
            events.close()
            return "streamed"

        threads = [in_thread(stream) for _ in range(8)]
        deadline = time.monotonic() + SECONDS
        while sum(bool(results) for _, results in threads) < 7 and time.monotonic() < deadline:
            time.sleep(0.001)
        held.set()
        for thread, _ in threads:
            thread.join(SECONDS)
        answers = sorted(str(results[0]) for _, results in threads)
        assert answers == ["another stream of this generator isn't finished: end it or close it first"] * 7 + [
            "streamed"
        ]
        assert list(generator.generate([[1]], GenerationConfig(max_new_tokens=1))[0].token_ids) == [checksum([1])]


def test_no_step_allocates_or_moves_the_cache(engine: OnnxRuntimeEngine) -> None:
    engine.reserve(1000)
    before = engine.cache.regions(0, 4)
    for row in range(4):
        engine.prefill(row, np.ones(900 + row, np.int64))
    engine.copy_row(0, 3, 900)
    for _ in range(20):
        engine.decode(0, ids(1, -1, 2, 3))
    assert engine.cache.regions(0, 4) == before


# Ends the interpreter with a generator in each state; what is left is freed in whatever order Python takes.
AT_EXIT = textwrap.dedent(
    """
    import sys, threading
    from qwen_aot.runtime.generation.config import GenerationConfig
    from qwen_aot.runtime.generation.generator import Generator

    generator = Generator.open(sys.argv[1], threads=1)
    config = GenerationConfig(max_new_tokens=900, temperature=0.0)
    steps = generator.engine.decode
    running = threading.Event()

    def decode(*arguments):
        running.set()
        return steps(*arguments)

    generator.engine.decode = decode
    if sys.argv[2] == "in a thread's step":
        threading.Thread(target=generator.generate, args=([[1, 2]], config), daemon=True).start()
        assert running.wait(20)
    elif sys.argv[2] == "in a stream":
        from qwen_aot.runtime.generation.request import Request
        stream = generator.stream([Request([1, 2], config)])
        next(stream)
    elif sys.argv[2] == "closed":
        generator.close()
        generator.close()
    print("end", flush=True)
    """
)


@pytest.mark.parametrize("state", ["open", "closed", "in a stream", "in a thread's step"])
def test_the_interpreter_ends_quietly(bundle: Path, state: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(bundle), state],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
