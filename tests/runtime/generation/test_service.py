"""The service on a fake engine: many threads and event loops, one end for each request, and nothing that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_aot.errors import ContextFullError, GenerationError, QueueFullError, ServiceClosedError
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.handle import RequestHandle
from qwen_aot.runtime.generation.request import Completion, FinishReason, Request, TokenEvent
from qwen_aot.runtime.generation.service import GenerationService
from tests.runtime.fakes import FakeEngine
from tests.runtime.generation.test_generator import continuation
from tests.runtime.texts import golden_tokenizer
from tests.runtime.toys import VOCAB_SIZE, make_manifest

LONG = 5_000_000  # tokens: a request that ends only when it is cancelled
ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(60, func_only=True)


class GatedEngine(FakeEngine):
    """Decodes only while its gate is open; a step that waits there says so."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.is_waiting = threading.Event()
        self.failure: BaseException | None = None

    def decode(self, first_row: int, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        self.is_waiting.set()
        assert self.gate.wait(30)
        self.is_waiting.clear()
        if self.failure is not None:
            raise self.failure
        return super().decode(first_row, token_ids)


def make(
    *, rows: int = 3, max_waiting: int = 100, poison: frozenset[int] = frozenset(), max_context: int = 1000
) -> tuple[GenerationService, GatedEngine]:
    engine = GatedEngine(make_manifest(max_batch=rows, max_context=max_context), poison=poison)
    return GenerationService(Generator(engine), max_waiting=max_waiting), engine


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:  # one that was asked to end by a finalizer does so by itself
        thread.join(10)
    assert not [thread for thread in left if thread.is_alive()]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_idle(service: GenerationService) -> bool:
    now = service.statistics()
    return (now.waiting, now.running) == (0, 0) and now.submitted == now.ended


def tokens(handle: RequestHandle) -> list[int]:
    return [event.token_id for event in handle if isinstance(event, TokenEvent)]


def test_what_comes_back_is_what_the_generator_gives() -> None:
    service, engine = make()
    with service:
        handles = [service.submit([n + 1, 5], max_new_tokens=n + 1) for n in range(8)]
        for n, handle in enumerate(handles):
            expected = continuation([n + 1, 5], n + 1)
            assert list(handle.result().token_ids) == expected
            assert tokens(handle) == expected == tokens(handle)  # each iteration begins anew
            *_, last = handle
            assert last is handle.result() and handle.is_done
            assert handle.prompt_ids == (n + 1, 5)
    assert list(service.generator.generate([3], max_new_tokens=2).token_ids) == continuation([3], 2)
    assert engine.rows == [[], [], []]


def test_asyncio() -> None:
    async def main() -> None:
        service, _ = make()
        async with service:
            first, second = service.submit([1], max_new_tokens=5), service.submit([2], max_new_tokens=7)
            given = [event.token_id async for event in first if isinstance(event, TokenEvent)]
            assert given == continuation([1], 5)
            assert list((await second).token_ids) == continuation([2], 7)
            assert [c.token_ids for c in await second.wait()] == [second.result().token_ids]
        with pytest.raises(ServiceClosedError):
            service.submit([1])

    asyncio.run(main())


def test_several_loops_and_threads_share_a_handle() -> None:
    service, engine = make()
    engine.gate.clear()
    with service:
        handle = service.submit([4], max_new_tokens=9)

        async def read() -> list[int]:
            return [event.token_id async for event in handle if isinstance(event, TokenEvent)]

        with ThreadPoolExecutor(6) as pool:
            readers = [pool.submit(lambda: asyncio.run(read())) for _ in range(3)]
            readers += [pool.submit(lambda: tokens(handle)) for _ in range(3)]
            assert engine.is_waiting.wait(30)
            engine.gate.set()
            assert [reader.result(30) for reader in readers] == [continuation([4], 9)] * 6


@pytest.mark.parametrize("seed", range(3))
def test_hundreds_of_requests_with_random_cancellations(seed: int) -> None:
    """From threads and two event loops: one end each, no token lost, each result that of the request alone."""
    poison = frozenset({200, 201, 202})
    service, _ = make(rows=4, max_waiting=10_000, poison=poison)
    handles: list[tuple[list[int], int, RequestHandle]] = []

    def request(rng: random.Random) -> tuple[list[int], int, RequestHandle]:
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 3, 20]))]
        count = rng.randint(1, 12)
        made = (
            prompt,
            count,
            service.submit(Request(prompt, GenerationConfig(max_new_tokens=count), keep_cache=rng.random() < 0.5)),
        )
        handles.append(made)
        return made

    def threaded(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        for _ in range(30):
            _, _, handle = request(rng)
            action = rng.random()
            if action < 0.2:
                handle.cancel()
            elif action < 0.4:
                next(iter(handle))
                handle.cancel()
            elif action < 0.6:
                with contextlib.suppress(NonFiniteLogitsError):
                    handle.result()

    async def one(rng: random.Random) -> None:
        _, _, handle = request(rng)
        with contextlib.suppress(NonFiniteLogitsError, TimeoutError):
            if rng.random() < 0.5:
                await asyncio.wait_for(handle.wait(), rng.choice([0.0, 0.001, 10]))
            else:
                async for _ in handle:
                    if rng.random() < 0.1:
                        break

    async def many(number: int) -> None:
        rng = random.Random(f"{seed} loop {number}")
        await asyncio.gather(*(one(rng) for _ in range(40)))

    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(threaded, number) for number in range(4)]
        jobs += [pool.submit(lambda number=number: asyncio.run(many(number))) for number in range(2)]
        for job in jobs:
            job.result()
    assert service.drain(30)
    reasons = set()
    for prompt, count, handle in handles:
        events = list(handle._channel.events)
        ends = [event for event in events if isinstance(event, Completion)]
        assert len(ends) == 1 and events[-1] is ends[0] and handle.is_done
        given = [event.token_id for event in events if isinstance(event, TokenEvent)]
        assert tuple(given) == ends[0].token_ids
        expected = continuation(prompt, count)
        reason = ends[0].finish_reason
        reasons.add(reason)
        if reason is FinishReason.LENGTH:
            assert given == expected
        else:
            assert given == expected[: len(given)]
        if reason is FinishReason.ERROR:
            assert poison & {*prompt, *given}
    assert {FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.ERROR} == reasons
    now = service.statistics()
    assert (now.submitted, now.ended, now.waiting, now.running) == (len(handles), len(handles), 0, 0)
    assert now.generated_tokens == sum(len(handle._channel.completions[0].token_ids) for _, _, handle in handles)
    service.close()


def test_what_the_rows_hold_is_told_between_steps() -> None:
    service, engine = make(rows=3)
    with service:
        assert service.cached_sequences() == []
        kept = service.submit(Request([1, 2, 3], GenerationConfig(max_new_tokens=3), keep_cache=True, cache_scope=7))
        made = kept.result(30).token_ids
        service.submit([4, 5, 6], max_new_tokens=3).result(30)  # keeps nothing
        assert service.cached_sequences(30) == [(7, [1, 2, 3, *made[:-1]])]
        engine.gate.clear()
        running = service.submit(Request([9, 9], GenerationConfig(max_new_tokens=LONG), keep_cache=True))
        assert engine.is_waiting.wait(30)
        with pytest.raises(TimeoutError):
            service.cached_sequences(0.01)
        engine.gate.set()
        (scope, tokens), *_ = sorted(service.cached_sequences(30))
        assert (scope, tokens[:2]) == (0, [9, 9])
        running.cancel()
    with pytest.raises(ServiceClosedError):
        service.cached_sequences()


def test_choices() -> None:
    service, _ = make(rows=2)
    with service:
        handle = service.submit([1], max_new_tokens=4, n=3)
        assert [list(each.token_ids) for each in handle.results(30)] == [continuation([1], 4)] * 3
        assert sorted(event.choice for event in handle if isinstance(event, Completion)) == [0, 1, 2]
        for ask in (handle.result, lambda: asyncio.run(handle.wait()) and handle.__await__()):
            with pytest.raises(GenerationError, match="the request has n=3 choices: use results"):
                ask()
        bad = service.submit([1], max_new_tokens=4, n=3)
        bad.cancel()
        assert len(bad.results(30)) == 3
        eventually(lambda: is_idle(service))
    service, _ = make(rows=2, poison=frozenset({200}))
    with service:
        with pytest.raises(NonFiniteLogitsError):
            service.submit([200], n=3).results(30)
        assert is_idle(service)


def test_a_slow_consumer_blocks_nobody_and_loses_nothing() -> None:
    service, _ = make()
    with service:
        slow = service.submit([1], max_new_tokens=50)
        events = iter(slow)
        next(events)
        assert len(service.submit([2], max_new_tokens=60).result(30).token_ids) == 60
        eventually(lambda: slow.is_done)
        assert [event.token_id for event in events if isinstance(event, TokenEvent)] == continuation([1], 50)[1:]


def test_a_full_queue() -> None:
    service, engine = make(rows=2, max_waiting=1)
    engine.gate.clear()
    handles = [service.submit([n], max_new_tokens=4) for n in (1, 2, 3)]
    with pytest.raises(QueueFullError, match=r"^3 choices run or wait .* at most 3 may, 1 of them waiting"):
        service.submit([4])
    engine.gate.set()
    handles[0].result(30)
    eventually(lambda: service.statistics().ended >= 1)
    assert len(service.submit([4], max_new_tokens=2).result(30).token_ids) == 2
    service.close()


def test_an_idle_service_takes_a_request_whatever_may_wait() -> None:
    service, _ = make(rows=1, max_waiting=0)
    with service:
        assert len(service.submit([1], max_new_tokens=3).result(30).token_ids) == 3
    for wrong in (-1, 1.5, True):
        with pytest.raises(GenerationError, match=r"max_waiting is .*; accepted: 0 or more"):
            GenerationService(Generator(FakeEngine(make_manifest())), max_waiting=wrong)  # type: ignore[arg-type]


def abandon_by_dropping(service: GenerationService) -> None:
    service.submit([1], max_new_tokens=LONG)


def abandon_by_leaving_a_loop(service: GenerationService) -> None:
    for _ in service.submit([1], max_new_tokens=LONG):
        break


def abandon_by_leaving_an_async_loop(service: GenerationService) -> None:
    async def main() -> None:
        async for _ in service.submit([1], max_new_tokens=LONG):
            break

    asyncio.run(main())


def abandon_by_closing_an_async_generator(service: GenerationService) -> None:
    async def texts() -> Any:
        async for event in service.submit([1], max_new_tokens=LONG):
            yield event

    async def main() -> None:
        generator = texts()
        await anext(generator)
        await generator.aclose()

    asyncio.run(main())


def abandon_by_cancelling_a_task(service: GenerationService) -> None:
    async def main() -> None:
        handle = service.submit([1], max_new_tokens=LONG)
        task = asyncio.ensure_future(handle.wait())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert handle.result(30).finish_reason == "cancelled"

    asyncio.run(main())


def abandon_by_cancelling_a_loop(service: GenerationService) -> None:
    handle = service.submit([1], max_new_tokens=LONG)

    async def read() -> None:
        async for _ in handle:
            pass

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read(), 0.02)

    asyncio.run(main())
    assert handle.result(30).finish_reason == "cancelled"


@pytest.mark.parametrize(
    "abandon",
    [
        abandon_by_dropping,
        abandon_by_leaving_a_loop,
        abandon_by_leaving_an_async_loop,
        abandon_by_closing_an_async_generator,
        abandon_by_cancelling_a_task,
        abandon_by_cancelling_a_loop,
    ],
)
def test_what_nobody_waits_for_is_cancelled(abandon: Callable[[GenerationService], None]) -> None:
    service, engine = make(max_context=2 * LONG)
    with service:
        abandon(service)
        gc.collect()
        eventually(lambda: is_idle(service))
        assert engine.rows == [[], [], []]


def test_a_timeout_of_result_cancels_nothing() -> None:
    service, engine = make()
    engine.gate.clear()
    with service:
        handle = service.submit([1], max_new_tokens=5)
        with pytest.raises(TimeoutError):
            handle.result(0.01)
        engine.gate.set()
        assert list(handle.result(30).token_ids) == continuation([1], 5)


def test_the_callers_own_event_cancels() -> None:
    service, _ = make(max_context=2 * LONG)
    with service:
        cancel = threading.Event()
        handles = [
            service.submit([1], max_new_tokens=LONG, cancel=cancel),
            service.submit(Request([1], GenerationConfig(max_new_tokens=LONG), cancel)),
        ]
        other = service.submit([1], max_new_tokens=50)
        cancel.set()
        assert [handle.result(30).finish_reason for handle in handles] == ["cancelled"] * 2
        assert other.result(30).finish_reason == "length"


def test_an_error_reaches_its_own_request_only() -> None:
    service, engine = make(rows=2, poison=frozenset({200}))
    with service:
        bad, good = service.submit([200]), service.submit([3], max_new_tokens=9)
        with pytest.raises(NonFiniteLogitsError):
            bad.result(30)
        with pytest.raises(NonFiniteLogitsError):
            list(bad)
        assert list(good.result(30).token_ids) == continuation([3], 9)
        assert is_idle(service) and engine.rows == [[], []]


def test_a_request_that_can_not_be_taken_is_refused_by_submit() -> None:
    service, engine = make(max_context=10)
    with service:
        with pytest.raises(ContextFullError):
            service.submit([1] * 11)
        with pytest.raises(GenerationError, match="has no tokenizer"):
            service.submit("text")
        with pytest.raises(TypeError, match=r"submit\(\) has no option 'max_tokens': did you mean 'max_new_tokens'"):
            service.submit([1], max_tokens=3)
        with pytest.raises(GenerationError, match="a Request holds its own settings"):
            service.submit(Request([1]), max_new_tokens=3)
        with pytest.raises(GenerationError, match="has no tokenizer, so it can't chat"):
            service.submit_chat([{"role": "user", "content": "x"}])
        assert service.statistics().submitted == 0 and engine.prefills == []


def test_a_request_that_can_not_be_started_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    service, _ = make()
    add = service.generator.driver.batch.add

    def refuse(request: Request, ids: list[int]) -> int:
        if ids == [13]:
            raise RuntimeError("a fault of ours")
        return add(request, ids)

    monkeypatch.setattr(service.generator.driver.batch, "add", refuse)
    with service:
        bad, good = service.submit([13]), service.submit([1], max_new_tokens=3)
        with pytest.raises(GenerationError, match="can't be started: RuntimeError"):
            bad.result(30)
        assert len(good.result(30).token_ids) == 3
        eventually(lambda: is_idle(service))


@pytest.mark.parametrize("failure", [RuntimeError("the driver is gone"), SystemExit(3)])
def test_the_end_of_the_worker_reaches_everyone(failure: BaseException) -> None:
    service, engine = make(rows=2)
    engine.gate.clear()
    handles = [service.submit([n], max_new_tokens=9) for n in range(4)]
    assert engine.is_waiting.wait(30)
    engine.failure = failure
    engine.gate.set()
    for handle in handles:
        with pytest.raises(ServiceClosedError, match="worker has failed") as caught:
            handle.result(30)
        assert caught.value.__cause__ is failure
    with pytest.raises(ServiceClosedError, match="worker has failed") as late:
        service.submit([1])
    assert late.value.__cause__ is failure
    assert not service.statistics().is_accepting and service.close() and is_idle(service)
    engine.failure = None
    assert list(service.generator.generate([3], max_new_tokens=2).token_ids) == continuation([3], 2)


def test_close_cancels_what_runs_and_waits_for_the_step() -> None:
    service, engine = make(rows=1)
    engine.gate.clear()
    handles = [service.submit([n], max_new_tokens=LONG) for n in (1, 2)]
    assert engine.is_waiting.wait(30)
    assert service.close(timeout=0.01) is False
    with pytest.raises(ServiceClosedError, match="closed or drained"):
        service.submit([1], max_new_tokens=LONG)
    with pytest.raises(GenerationError, match="this generator is in a GenerationService"):
        service.generator.generate([1])
    engine.gate.set()
    assert service.close() and service.close()
    assert [handle.result(0).finish_reason for handle in handles] == ["cancelled"] * 2
    assert engine.rows == [[]]
    assert service.generator.generate([1], max_new_tokens=1)


def test_closing_from_many_threads_and_loops_at_once() -> None:
    service, _ = make(max_context=2 * LONG)
    handles = [service.submit([n], max_new_tokens=LONG) for n in range(20)]

    async def aclose() -> None:
        await asyncio.gather(service.aclose(), service.aclose())

    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(service.close) for _ in range(3)]
        jobs += [pool.submit(lambda: asyncio.run(aclose())) for _ in range(3)]
        for job in jobs:
            job.result(30)
    assert {handle.result(0).finish_reason for handle in handles} == {"cancelled"}


def test_submitting_while_it_closes_ends_every_handle() -> None:
    for _ in range(10):
        service, _ = make(max_waiting=1_000_000)
        taken: list[RequestHandle] = []

        def submit(service: GenerationService = service, taken: list[RequestHandle] = taken) -> None:
            with pytest.raises(ServiceClosedError):
                while True:
                    taken.append(service.submit([1], max_new_tokens=3))

        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(submit) for _ in range(3)]
            eventually(lambda taken=taken: bool(taken))
            service.close()
            for job in jobs:
                job.result(30)
        for handle in taken:
            try:
                end = handle.result(30)
            except ServiceClosedError:
                assert handle._channel.completions == []
                continue
            ids, whole = list(end.token_ids), continuation([1], 3)
            assert (end.finish_reason, ids) in [("length", whole)] + [("cancelled", whole[:n]) for n in range(3)]


def test_what_comes_after_the_end_of_the_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    service, _ = make()
    service.close()
    monkeypatch.setattr(service._worker, "check", lambda: None)  # as if it had looked just before the end
    with pytest.raises(ServiceClosedError, match="closed or drained"):
        service.submit([1]).result(5)


def test_drain_finishes_what_was_submitted() -> None:
    service, engine = make(rows=1)
    engine.gate.clear()
    handles = [service.submit([n], max_new_tokens=4) for n in (1, 2, 3)]
    assert service.drain(0.01) is False
    with pytest.raises(ServiceClosedError):
        service.submit([1])
    engine.gate.set()
    assert service.drain(30)
    assert [list(handle.result(0).token_ids) for handle in handles] == [continuation([n], 4) for n in (1, 2, 3)]


def test_leaving_after_an_exception_cancels() -> None:
    service, _ = make(max_context=2 * LONG)
    with pytest.raises(KeyError), service:
        handle = service.submit([1], max_new_tokens=LONG)
        raise KeyError
    assert handle.result(0).finish_reason == "cancelled"


def test_closing_the_generator_under_a_service() -> None:
    service, engine = make(max_context=2 * LONG)
    handle = service.submit([1], max_new_tokens=LONG)
    next(iter(handle))
    service.generator.close()
    with pytest.raises(ServiceClosedError, match="the engine is closed"):
        handle.result(30)
    assert engine.is_closed and service.close()


def test_a_generator_in_use_is_refused() -> None:
    service, _ = make()
    with pytest.raises(GenerationError, match="is in a GenerationService"):
        GenerationService(service.generator)
    service.close()
    stream = service.generator.stream([1], max_new_tokens=3)
    next(stream)
    with pytest.raises(GenerationError, match="another stream of this generator isn't finished"):
        GenerationService(service.generator)
    stream.close()
    GenerationService(service.generator).close()


def test_a_service_without_a_thread_gives_the_generator_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine = GatedEngine(make_manifest())
    generator = Generator(engine)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            GenerationService(generator)
    assert list(generator.generate([3], max_new_tokens=2).token_ids) == continuation([3], 2)


def test_a_service_that_nobody_holds_ends() -> None:
    service, engine = make(max_context=2 * LONG)
    handle = service.submit([1], max_new_tokens=LONG)
    generator = service.generator
    del service
    next(iter(handle))  # the handle holds the service
    del handle
    gc.collect()
    eventually(lambda: engine.rows == [[], [], []])
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "qwen-aot-generation"])
    assert generator.generate([1], max_new_tokens=1)


def test_statistics() -> None:
    service, engine = make(rows=2)
    engine.gate.clear()
    handles = [service.submit([1, 2], max_new_tokens=3) for _ in range(5)]
    assert engine.is_waiting.wait(30)
    now = service.statistics()
    assert (now.waiting + now.running, now.submitted, now.ended, now.is_accepting) == (5, 5, 0, True)
    engine.gate.set()
    for handle in handles:
        handle.result(30)
    now = service.statistics()
    assert (now.submitted, now.prompt_tokens, now.generated_tokens, now.cached_tokens) == (5, 10, 15, 0)
    service.close()
    assert not service.statistics().is_accepting and is_idle(service)


def test_chats_share_their_beginnings() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>"
    engine = FakeEngine(make_manifest(max_batch=2, vocab_size=400), lambda row: 65)
    generator = Generator(engine, golden_tokenizer({"chat_template": template}))
    messages = [{"role": "system", "content": "Be terse and polite."}, {"role": "user", "content": "one"}]
    with GenerationService(generator) as service:
        assert service.submit_chat(messages, max_new_tokens=4).result(30).cached_tokens == 0
        again = service.submit_chat([*messages[:1], {"role": "user", "content": "two"}], max_new_tokens=4).result(30)
        assert again.cached_tokens >= len(
            golden_tokenizer().encode("<|im_start|>system\nBe terse and polite.<|im_end|>")
        )


def run_script(text: str) -> subprocess.CompletedProcess[str]:
    """A program of its own, with a service that takes 20 ms a step and a request that runs for minutes."""
    head = """
import asyncio, gc, os, signal, sys, threading, time, warnings
from qwen_aot.errors import *
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.service import GenerationService
from tests.runtime.fakes import FakeEngine
from tests.runtime.toys import make_manifest

class Slow(FakeEngine):
    def decode(self, first_row, token_ids):
        time.sleep(0.02)
        return super().decode(first_row, token_ids)

generator = Generator(Slow(make_manifest(max_batch=2, max_context=2_000_000)))
service = GenerationService(generator)
"""
    return subprocess.run(
        [sys.executable, "-c", head + text], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )


BUSY = (
    "handle.result()",
    "list(handle)",
    "[service.submit([1], max_new_tokens=1) for _ in iter(int, 1)]",
    "[service.statistics() for _ in iter(int, 1)]",
    "service.drain()",
    "service.close()",
    "time.sleep(60)",
    "asyncio.run(handle.wait())",
)


def test_a_signal_handler_closes_the_service() -> None:
    """Whatever the main thread is doing: it ends with what the closing did, and not by the signal or a timeout."""
    script = f"""
class Closed(Exception): pass

def handler(number, frame):
    assert service.close(), "the worker goes on"
    raise Closed

signal.signal(signal.SIGALRM, handler)
service.close()
for busy in {BUSY!r}:
    service = GenerationService(generator, max_waiting=100_000)
    handle = service.submit([1], max_new_tokens=1_000_000)
    next(iter(handle))
    signal.setitimer(signal.ITIMER_REAL, 0.001 if busy == "service.close()" else 0.1)
    try:
        exec(busy)
        time.sleep(0.1)  # an own close may be faster than the signal
    except Closed:
        pass
    print(handle.result(0).finish_reason, service.statistics().running)
"""
    done = run_script(script)
    assert (done.returncode, done.stdout) == (0, "cancelled 0\n" * len(BUSY)), done.stderr


def test_a_program_that_forgets_to_close_ends() -> None:
    done = run_script("handle = service.submit([1], max_new_tokens=1_000_000); next(iter(handle)); print('end')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not hasattr(sys, "getandroidapilevel") and sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_is_told() -> None:
    script = """
handle = service.submit([1], max_new_tokens=1_000_000)
next(iter(handle))
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forking beside threads
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    handle.cancel()
    print(handle.result(10).finish_reason)
    service.close()
else:
    told = 0
    asks = lambda: service.submit([1]), handle.result, lambda: list(handle), lambda: generator.generate([1])
    for ask in asks:
        try:
            ask()
        except GenerationError as error:
            told += "forked from it without its threads" in str(error)
    service.close()
    os._exit(0 if told == 4 else 1)
"""
    done = run_script(script)
    assert (done.returncode, done.stdout) == (0, "cancelled\n"), done.stderr
