"""Requests that come and go at given steps, run through a Batch on a fake engine, and what happened at each step."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.request import Completion, Event, FinishReason, Request
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
    def ended(self) -> list[tuple[int, FinishReason]]:
        """The requests that ended, in order."""
        return [(event.index, event.finish_reason) for event in self.events if isinstance(event, Completion)]


class RecordedEngine(FakeEngine):
    """Writes every call down, with the requests that the rows belong to, and looks at the batch after each."""

    batch: Batch
    step: Step

    def prefill(self, row, token_ids):  # type: ignore[no-untyped-def]
        self.step.prefills.append((row, token_ids.tolist()))
        self.step.calls.append(["prefill", row, self._request(row), len(self.rows[row]), len(token_ids)])
        return super().prefill(row, token_ids)

    def decode(self, first_row, token_ids):  # type: ignore[no-untyped-def]
        self.step.decodes.append((first_row, token_ids.tolist()))
        requests = [self._request(first_row + i) if id_ >= 0 else -1 for i, id_ in enumerate(token_ids.tolist())]
        self.step.calls.append(["decode", first_row, requests])
        return super().decode(first_row, token_ids)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.step.copies.append((source, target, length))
        self.step.calls.append(["copy", source, target, length])
        super().copy_row(source, target, length)

    def _request(self, row: int) -> int:
        occupant = self.batch._rows[row]
        assert occupant is not None
        return occupant.index


def run(
    plan: Sequence[Planned],
    *,
    rows: int,
    prefill_chunk: int = 512,
    next_token: Callable[[list[int]], int] = checksum,
    most_steps: int = 10_000,
    poison: frozenset[int] = frozenset(),
) -> list[Step]:
    """Runs a plan to its end.

    Requests are numbered in the order of their arrival: a plan must be sorted by it.

    Raises:
        AssertionError: it takes more steps than that, or a row doesn't hold what the batch thinks.
    """
    assert all(a.arrives <= b.arrives for a, b in itertools.pairwise(plan))
    manifest = make_manifest(max_batch=rows, max_context=MAX_CONTEXT, prefill_chunk=prefill_chunk)
    engine = RecordedEngine(manifest, next_token, poison)
    batch = engine.batch = Batch(engine, None)
    cancels = [threading.Event() for _ in plan]
    steps: list[Step] = []
    while len(steps) <= max((each.arrives for each in plan), default=-1) or not batch.is_idle:
        assert len(steps) < most_steps, f"not done after {most_steps} steps"
        for each, cancel in zip(plan, cancels, strict=True):
            if each.cancelled is not None and each.cancelled <= len(steps):
                cancel.set()
            if each.arrives == len(steps):
                config = GenerationConfig(max_new_tokens=each.max_new_tokens)
                batch.add(Request(each.prompt, config, cancel, keep_cache=each.keep_cache))
        engine.step = Step()
        engine.step.events = batch.step()
        engine.step.prefilling = {row.index for row in batch._rows if row is not None and not row.is_prefilled}
        steps.append(engine.step)
        check_rows(batch, engine)
    return steps


def check_rows(batch: Batch, engine: FakeEngine) -> None:
    """Each row's cache is what the batch believes it to be."""
    for row, (occupant, held) in enumerate(zip(batch._rows, batch._held, strict=True)):
        if occupant is None:
            assert engine.rows[row] == held
        elif occupant.is_prefilled:
            assert engine.rows[row] == (occupant.prompt_ids + occupant.token_ids)[:-1]
        else:
            assert engine.rows[row] == occupant.prompt_ids[: occupant.prefilled_tokens]
