"""Requests that come and go at given steps, run through a Batch on a fake engine, and what happened at each step."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.bundle.manifest import IoTensor, rotary_table
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.request import Completion, Event, FinishReason, Request
from qwen_aot.runtime.generation.sequence import ActiveSequence
from tests.runtime.fakes import FakeEngine
from tests.runtime.toys import checksum, make_manifest

MAX_CONTEXT = 1000


@dataclass(frozen=True)
class Planned:
    """A request that arrives, and is cancelled, before the step of that number."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    arrives: int = 0
    cancelled: int | None = None
    keep_cache: bool = False
    n: int = 1
    prompt_logprobs: int | None = None
    cache_scope: int = 0


@dataclass(frozen=True)
class Fault:
    """The nth call of a kind fails, counted from 0; with rows, a decode in which their logits aren't finite."""

    call: str
    number: int
    rows: tuple[int, ...] | None = None


@dataclass
class Step:
    """What one step did.

    Attributes:
        decodes: first row and tokens, of each decode call.
        prefills: row and tokens, of each prefill call.
        copies: source row, target row and length, of each copy.
        calls: all of them in the form of schedule.json.
        events: what the step returned.
        prefilling: the requests in rows whose prompt isn't whole after the step.
    """

    decodes: list[tuple[int, list[int]]] = field(default_factory=list)
    prefills: list[tuple[int, list[int]]] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    calls: list[list[object]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    prefilling: set[int] = field(default_factory=set)

    @property
    def ended(self) -> list[tuple[int, FinishReason, int]]:
        """The requests that ended, in order, with their choices."""
        return [(e.index, e.finish_reason, e.choice) for e in self.events if isinstance(e, Completion)]


class RecordedEngine(FakeEngine):
    """Writes every call down, with the requests that the rows belong to, and looks at the batch after each."""

    batch: Batch
    step: Step
    faults: Sequence[Fault] = ()
    counts: Counter[object]

    def prefill(self, row, token_ids, prompt_tokens=None):  # type: ignore[no-untyped-def]
        self.step.prefills.append((row, token_ids.tolist()))
        occupant = self._occupant(row)
        assert occupant.choice == 0
        self._record(["prefill", row, occupant.index, len(self.rows[row]), len(token_ids)])
        return super().prefill(row, token_ids, prompt_tokens)

    def decode(self, first_row, token_ids):  # type: ignore[no-untyped-def]
        self.step.decodes.append((first_row, token_ids.tolist()))
        who = [self._who(first_row + i) if id_ >= 0 else -1 for i, id_ in enumerate(token_ids.tolist())]
        self._record(["decode", first_row, who])
        return super().decode(first_row, token_ids)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.step.copies.append((source, target, length))
        self._record(["copy", source, target, length])
        super().copy_row(source, target, length)

    def _record(self, call: list[object]) -> None:
        self.step.calls.append(call)
        number = self.counts[call[0]]
        self.counts[call[0]] += 1
        for fault in self.faults:
            if (fault.call, fault.number) == (call[0], number):
                raise GenerationError("the device failed") if fault.rows is None else NonFiniteLogitsError(fault.rows)

    def _who(self, row: int) -> object:
        occupant = self._occupant(row)
        return [occupant.index, occupant.choice] if occupant.choice else occupant.index

    def _occupant(self, row: int) -> ActiveSequence:
        occupant = self.batch._rows[row]
        assert occupant is not None
        return occupant


def run(
    plan: Sequence[Planned],
    *,
    rows: int,
    prefill_chunk: int = 512,
    next_token: Callable[[list[int]], int] = checksum,
    most_steps: int = 10_000,
    poison: frozenset[int] = frozenset(),
    faults: Sequence[Fault] = (),
    rotary_length: int | None = None,
) -> list[Step]:
    """Runs a plan to its end.

    Requests are numbered in the order of their arrival: a plan must be sorted by it.

    Raises:
        AssertionError: it takes more steps than that, or a row doesn't hold what the batch thinks.
    """
    assert all(a.arrives <= b.arrives for a, b in itertools.pairwise(plan))
    inputs = () if rotary_length is None else (IoTensor(f"rotary_offset.{rotary_length}", "int64", ("B",)),)
    manifest = make_manifest(inputs=inputs, max_batch=rows, max_context=MAX_CONTEXT, prefill_chunk=prefill_chunk)
    engine = RecordedEngine(manifest, next_token, poison)
    engine.faults, engine.counts = faults, Counter()
    batch = engine.batch = Batch(engine, None)
    cancels = [threading.Event() for _ in plan]
    steps: list[Step] = []
    while len(steps) <= max((each.arrives for each in plan), default=-1) or not batch.is_idle:
        assert len(steps) < most_steps, f"not done after {most_steps} steps"
        for each, cancel in zip(plan, cancels, strict=True):
            if each.cancelled is not None and each.cancelled <= len(steps):
                cancel.set()
            if each.arrives == len(steps):
                config = GenerationConfig(
                    max_new_tokens=each.max_new_tokens, n=each.n, prompt_logprobs=each.prompt_logprobs
                )
                batch.add(
                    Request(each.prompt, config, cancel, keep_cache=each.keep_cache, cache_scope=each.cache_scope)
                )
        engine.step = Step()
        engine.step.events = batch.step()
        engine.step.prefilling = {row.index for row in batch._rows if row is not None and not row.is_running}
        steps.append(engine.step)
        check_rows(batch, engine)
    return steps


def check_rows(batch: Batch, engine: FakeEngine) -> None:
    """Each row's cache is what the batch believes it to be, rotated by the table of its own prompt."""
    length = engine.manifest.engines.text.rotary_length
    for row, (occupant, held) in enumerate(zip(batch._rows, batch._held, strict=True)):
        if engine.rows[row]:
            table = held.rotary_table if occupant is None else rotary_table(length, len(occupant.prompt_ids))
            assert rotary_table(length, engine.prompts[row]) == table
        if occupant is None:
            assert engine.rows[row] == held.tokens
        elif occupant.is_prefilled:
            assert engine.rows[row] == (occupant.prompt_ids + occupant.token_ids)[:-1]
        else:
            assert engine.rows[row] == occupant.prompt_ids[: occupant.prefilled_tokens]
