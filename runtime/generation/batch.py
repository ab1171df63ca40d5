"""Continuous batching in bounded steps: requests wait for one of the engine's rows, and share it chunk by chunk.

docs/scheduling.md states the rules; tests/golden/schedule.json pins them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.bundle.manifest import rotary_table
from qwen_aot.runtime.engine.protocol import Engine, NonFiniteLogitsError
from qwen_aot.runtime.generation.choices import PendingChoices
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from qwen_aot.runtime.generation.images import check_images, rows_between
from qwen_aot.runtime.generation.prompt import prompt_ids
from qwen_aot.runtime.generation.request import Completion, Event, FinishReason, Request
from qwen_aot.runtime.generation.sequence import ActiveSequence, PromptWork
from qwen_aot.runtime.generation.speculation import Speculation, SpeculationStatistics
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = [
    "ALWAYS_COMPUTED",
    "CHUNK_ALONE",
    "CHUNK_BESIDE_DECODE",
    "COPY_TOKENS",
    "TOKENS_PER_IDLE_ROW",
    "Batch",
]

# Tokens of a prompt in one step: what running streams wait for, and what no one waits for. docs/scheduling.md has the
# measurements.
CHUNK_BESIDE_DECODE = 64
CHUNK_ALONE = 256

# An idle row in a decode step costs about as much as copying this many tokens of a row.
TOKENS_PER_IDLE_ROW = 192

# A step admits no more once it has copied so many tokens of rows: about what five idle rows cost.
COPY_TOKENS = 1024

# Of a prompt so many tokens are computed whatever the cache holds. The last one's logits are needed; and a step of one
# token runs other kernels than a chunk, which round otherwise: two, and an answer is the same as without a cache.
ALWAYS_COMPUTED = 2

_IDLE = -1  # the engine's mark of a row without a token


@dataclass(frozen=True, slots=True)
class _Held:
    """What is in the cache of a free row.

    Attributes:
        tokens: ids, or keys of images (`images.cache_keys`); none: the row is empty.
        scope: of the request that left them.
        left: how many rows had been left filled before, and this one; 0 of an empty row.
        rotary_table: that its keys were rotated by; a prompt of another one can't start from them.
    """

    tokens: list[int]
    scope: int
    left: int
    rotary_table: int = 0


_NOTHING = _Held([], 0, 0)


class Batch:
    """Schedules requests on an engine, which it alone may drive. One thread at a time."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        defaults: GenerationDefaults | None = None,
        *,
        speculate: bool = True,
    ) -> None:
        """Starts with every row free.

        Args:
            engine: nothing else may drive it meanwhile.
            tokenizer: None: prompts are token ids and there is no text.
            defaults: for what a request leaves open; None: what the manifest says.
            speculate: check drafted tokens, where the bundle can and it pays.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._defaults = defaults or GenerationDefaults.from_manifest(engine.manifest)
        self._waiting: deque[ActiveSequence] = deque()
        self._pending: dict[int, PendingChoices] = {}  # by request, in order of arrival
        rows = engine.manifest.max_batch
        self._rows: list[ActiveSequence | None] = [None] * rows
        self._held: list[_Held] = [_NOTHING] * rows  # in rows that are free
        self._left = 0  # how often a row was left filled
        self._next: NDArray[np.int64] = np.full(rows, _IDLE, np.int64)  # each row's token to feed
        self._prefilling: deque[int] = deque()  # rows, the next to take a chunk first
        self._idle_cost = 0  # of idle rows in decode steps since the last move, in tokens copied
        self._count = 0
        self._rotary_length = engine.manifest.engines.text.rotary_length
        logits_rows = engine.manifest.engines.text.logits_rows
        self._speculation = Speculation(logits_rows) if speculate and logits_rows is not None else None

    @property
    def speculation(self) -> SpeculationStatistics | None:
        """What became of drafts; None: nothing is drafted."""
        return None if self._speculation is None else self._speculation.statistics

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waiting or running."""
        return not self._waiting and all(sequence is None for sequence in self._rows)

    @property
    def rows_in_use(self) -> int:
        """How many rows hold a request."""
        return sum(sequence is not None for sequence in self._rows)

    def tokenize(self, request: Request) -> list[int]:
        """A request's prompt as ids, checked; changes nothing.

        An empty prompt starts from the model's BOS token.

        Raises:
            GenerationError: see `prompt.prompt_ids`.
            ContextFullError: the prompt is longer than the context.
        """
        config = self._complete(request, room=1)
        ids = prompt_ids(request.prompt, config, self._tokenizer, self._engine.manifest)
        check_images(request.images, len(ids))
        if request.images and config.prompt_logprobs is not None:
            raise GenerationError(
                "prompt_logprobs of a prompt with images don't exist: for them tokens are fed one by one, which images "
                "aren't; leave one of both out"
            )
        return ids

    def add(self, request: Request, ids: list[int] | None = None) -> int:
        """Queues a request; returns its index, which its events carry.

        Args:
            request: what to generate.
            ids: what `tokenize` gave for it, if that has been called.

        Raises:
            GenerationError: see `tokenize`.
        """
        index = self._count
        ids = self.tokenize(request) if ids is None else ids
        # The last token needn't fit: it is never fed.
        config = self._complete(request, room=self._engine.manifest.max_context - len(ids) + 1)
        prompt = PromptWork()
        first, *others = [
            ActiveSequence(index, request, config, ids, self._tokenizer, choice, prompt) for choice in range(config.n)
        ]
        self._waiting.append(first)
        if others:
            self._pending[index] = PendingChoices(others)
        self._count += 1
        return index

    def cached_sequences(self) -> list[tuple[int, list[int]]]:
        """What other requests may start from: of each row that has some, the scope and the tokens.

        Of tokens that stand for an image, its `images.cache_keys`, below 0.
        """
        found = []
        for row in range(len(self._rows)):
            scope, tokens = self._content(row)
            if scope is not None and tokens:
                found.append((scope, list(tokens)))
        return found

    def step(self) -> list[Event]:
        """Does one bounded piece of work: at most one decode of all running rows and one chunk of one prompt.

        Before that, cancelled requests end; choices that are due and waiting requests take free rows. A request that
        fails by itself, in its prefill or by logits that aren't finite, ends with an error in its Completion, and the
        others go on; a decode step that fails ends those that were in it.
        """
        events: list[Event] = self._retire_cancelled()
        events += self._admit()
        events += self._compact()
        events += self._decode()
        events += self._prefill()
        return events

    def restart(self) -> None:
        """Counts indices from 0 again; nothing may be waiting or running."""
        assert self.is_idle
        self._count = 0

    def abandon(self) -> None:
        """Drops every request. Rows stay filled for the requests that keep their cache, as if cancelled."""
        self._waiting.clear()
        self._pending.clear()
        for row, sequence in enumerate(self._rows):
            if sequence is not None:
                self._retire(row, sequence.finish(FinishReason.CANCELLED))

    def clear(self) -> None:
        """Drops every request and empties every row."""
        self._waiting.clear()
        self._pending.clear()
        self._prefilling.clear()
        for row in range(len(self._rows)):
            self._rows[row] = None
            self._forget(row)

    def _admit(self) -> list[Event]:
        """Gives free rows to choices that are due, then to waiting requests, in their order.

        The copy with which a step has copied enough, or one that fails, is the last thing. For a request that follows
        a prompt in prefill a row stays free.
        """
        events: list[Event] = []
        copied = followers = 0
        while copied < COPY_TOKENS and None in self._rows:
            due = next((index for index, pending in self._pending.items() if pending.is_due), None)
            logits = None
            if due is not None:
                row, donor = self._row_to_give(), self._row_of(due)
                logits = self._begin_choice(row, self._occupant(donor))
            elif followers < min(len(self._waiting), self._rows.count(None)):
                sequence = self._waiting[followers]
                if self._follows(sequence):
                    followers += 1
                    continue
                del self._waiting[followers]
                row, donor = self._begin_prompt(sequence)
            else:
                break
            if donor != row:
                shared = self._occupant(row).prefilled_tokens
                try:
                    self._engine.copy_row(donor, row, shared)
                except GenerationError as error:
                    return [*events, *self._fail(row, error)]
                copied += shared
            if logits is not None:
                events += self._advance(row, logits)
        return events

    def _begin_prompt(self, sequence: ActiveSequence) -> tuple[int, int]:
        """Seats a request; returns its row, and the one to copy its beginning from (the same: nothing is copied)."""
        row = self._choose_row(sequence)
        shared = [self._shared(each, sequence) for each in range(len(self._rows))]
        donor = max(range(len(shared)), key=lambda each: (shared[each], each == row))
        self._rows[row] = sequence
        self._held[row] = _NOTHING
        self._prefilling.append(row)
        if donor == row:
            self._engine.truncate(row, shared[row])
        sequence.begin_cached(shared[donor])
        return row, donor

    def _begin_choice(self, row: int, sibling: ActiveSequence) -> NDArray[np.float32]:
        """Seats the next choice of a request; returns the logits [V] of the prompt's last token."""
        pending = self._pending[sibling.index]
        sequence, logits = pending.begin()
        if not pending:
            del self._pending[sibling.index]
        self._rows[row] = sequence
        self._held[row] = _NOTHING
        return logits

    def _compact(self) -> list[Event]:
        """Moves or empties one row, if that shortens the span of running rows and idle ones have cost as much."""
        running = self._running()
        move = self._find_move(running)
        if move is None:
            self._idle_cost = 0
            return []
        self._idle_cost += (running[-1] - running[0] + 1 - len(running)) * TOKENS_PER_IDLE_ROW
        source, target = move
        length = int(self._engine.cache_length[source])
        if self._idle_cost < length:
            return []
        self._idle_cost = 0
        if source == target:
            self._forget(source)
            return []
        try:
            self._engine.copy_row(source, target, length)
        except GenerationError as error:
            if self._rows[source] is not None:
                return self._fail(source, error)
            self._forget(source)
            return []
        self._rows[target], self._rows[source] = self._rows[source], None
        self._held[target] = self._held[source]
        self._next[target] = self._next[source]
        self._forget(source)
        return []

    def _find_move(self, running: list[int]) -> tuple[int, int] | None:
        """The row to move and where to, so that fewer idle rows lie between running ones; None: nothing helps.

        A running row at either end goes into an empty row between them. If there are only rows there that hold a
        conversation, the shortest of these goes out of the way first. If no row is empty, the one that was left longest
        ago is to be emptied: it goes to itself.
        """
        if not running:
            return None
        first, last = running[0], running[-1]
        empty = [row for row in self._free() if not self._held[row].tokens]
        holes = [row for row in empty if first < row < last]
        if holes:
            without_last = max(running[-2], holes[0]) - first
            without_first = last - min(running[1], holes[-1])
            return (last, holes[0]) if without_last <= without_first else (first, holes[-1])
        held = [row for row in range(first + 1, last) if self._held[row].tokens]
        if held and empty:
            return min(held, key=lambda row: (len(self._held[row].tokens), row)), empty[0]
        if held:
            oldest = self._row_to_give()
            return oldest, oldest
        return None

    def _decode(self) -> list[Event]:
        running = self._running()
        if not running:
            return []
        first, end = running[0], running[-1] + 1
        drafts = self._choose_drafts(running)
        started = time.perf_counter()
        try:
            logits = self._verify(first, end, drafts) if drafts else None
            if logits is None:
                drafts = {}
                logits = self._engine.decode(first, self._next[first:end])[:, None]
        except NonFiniteLogitsError as error:
            return [event for row in error.rows for event in self._fail(row, error)]
        except GenerationError as error:
            return [event for row in running for event in self._fail(row, error)]
        seconds = time.perf_counter() - started
        if self._speculation is not None:
            self._speculation.note_step(end - first, logits.shape[1], seconds)
        events: list[Event] = []
        for row in running:
            drafted = drafts.get(row, ())
            told = logits[row - first, -1 - len(drafted) :]
            events += self._advance_draft(row, told, drafted, seconds)
        return events

    def _verify(self, first: int, end: int, drafts: Mapping[int, tuple[int, ...]]) -> NDArray[np.float32] | None:
        """A step that feeds rows their next token and what was drafted behind it; gives logits [B, S, V].

        None: the logits of some row aren't finite, which may be a wrong token's fault; nothing has moved.
        """
        token_ids = np.full((end - first, 1 + max(map(len, drafts.values()))), _IDLE, np.int64)
        token_ids[:, 0] = self._next[first:end]
        for row, drafted in drafts.items():
            token_ids[row - first, 1 : 1 + len(drafted)] = drafted
        try:
            return self._engine.verify(first, token_ids)
        except NonFiniteLogitsError:
            return None

    def _choose_drafts(self, running: list[int]) -> dict[int, tuple[int, ...]]:
        """Tokens to check behind the next one of each row that has some."""
        if self._speculation is None:
            return {}
        most = self._speculation.most - 1
        drafts = {row: self._occupant(row).draft(most) for row in running}
        return self._speculation.choose(running[-1] + 1 - running[0], drafts)

    def _advance_draft(
        self, row: int, logits: NDArray[np.float32], drafted: tuple[int, ...], seconds: float
    ) -> list[Event]:
        """Chooses a row's next tokens from logits [n, V], as long as each was drafted; takes the others back.

        Args:
            row: one that was in a step of `seconds`.
            logits: of its next token and of each drafted one.
            drafted: n - 1 tokens.
            seconds: that the step took.
        """
        sequence = self._occupant(row)
        fed = int(self._engine.cache_length[row]) - len(drafted) if drafted else None
        is_prompt, before = not sequence.is_prefilled, len(sequence.token_ids)
        events: list[Event] = []
        for place, told in enumerate(logits):
            if not sequence.is_prefilled:
                sequence.note_fed(1, seconds if place == 0 else 0.0)
            events += self._advance(row, told, None if fed is None else fed + place)
            if place == len(drafted) or self._rows[row] is not sequence or self._next[row] != drafted[place]:
                break
        if fed is not None and self._rows[row] is sequence:
            self._engine.truncate(row, fed + place)
        if self._speculation is not None and not is_prompt:
            sequence.learn(before)
            if drafted:
                self._speculation.note_draft(len(drafted), place)
        return events

    def _prefill(self) -> list[Event]:
        """Prefills one chunk of the row whose turn it is."""
        if not self._prefilling:
            return []
        row = self._prefilling[0]
        sequence = self._occupant(row)
        size = min(CHUNK_BESIDE_DECODE if self._running() else CHUNK_ALONE, self._engine.manifest.prefill_chunk)
        if sequence.has_prompt_logprobs:
            size = 1
        start = sequence.prefilled_tokens
        ids = np.asarray(sequence.prompt_ids[start : start + size], np.int64)
        started = time.perf_counter()
        try:
            images = rows_between(sequence.request.images, start, start + len(ids))
            whole = len(sequence.prompt_ids)
            if images is None:
                logits = self._engine.prefill(row, ids, whole)
            else:
                logits = self._engine.prefill(row, ids, whole, images)
        except GenerationError as error:
            return self._fail(row, error)
        sequence.note_fed(len(ids), time.perf_counter() - started)
        self._prefilling.rotate(-1)
        if not sequence.is_running:
            return []
        self._prefilling.remove(row)
        return self._advance(row, logits)

    def _running(self) -> list[int]:
        """Rows whose next token is known, ascending."""
        return [row for row, sequence in enumerate(self._rows) if sequence is not None and sequence.is_running]

    def _advance(self, row: int, logits: NDArray[np.float32], fed: int | None = None) -> list[Event]:
        """Chooses a row's next token from logits [V]; if that ends it, the row goes to a choice that is due.

        Args:
            row: of the token.
            logits: behind its last token.
            fed: tokens of the row up to that one, where drafted ones stand behind it; None: none do.
        """
        sequence = self._occupant(row)
        if not sequence.is_prefilled:
            self._next[row] = sequence.read_prompt(logits)
            return []
        if sequence.index in self._pending:
            self._pending[sequence.index].keep(logits)
        events = sequence.advance(logits)
        while isinstance(events[-1], Completion):
            if sequence.index not in self._pending:
                if fed is not None:
                    self._engine.truncate(row, fed)
                self._retire(row, events[-1])
                return events
            self._engine.truncate(row, len(sequence.prompt_ids))
            fed = None
            logits = self._begin_choice(row, sequence)
            sequence = self._occupant(row)
            events += sequence.advance(logits)
        self._next[row] = sequence.token_ids[-1]
        return events

    def _occupant(self, row: int) -> ActiveSequence:
        sequence = self._rows[row]
        assert sequence is not None
        return sequence

    def _row_of(self, index: int) -> int:
        """The lowest row of a request that has one."""
        return next(row for row, each in enumerate(self._rows) if each is not None and each.index == index)

    def _free(self) -> list[int]:
        """Rows without a request, ascending."""
        return [row for row, occupant in enumerate(self._rows) if occupant is None]

    def _row_to_give(self) -> int:
        """The lowest empty row, or the free one that was left longest ago, whose content is dropped."""
        return min(self._free(), key=lambda row: (self._held[row].left, row))

    def _choose_row(self, sequence: ActiveSequence) -> int:
        """The free row for a request: the one that it shares most with, of equals the one that was left longest ago.

        But `_row_to_give` where that would cost another conversation more than it saves: two of them may share a system
        prompt and nothing else.
        """
        shared = {row: self._shared(row, sequence) for row in self._free()}
        best = max(shared, key=lambda row: (shared[row], -self._held[row].left, -row))
        lost = len(self._held[best].tokens) - shared[best]
        return self._row_to_give() if 2 * lost > shared[best] else best

    def _shared(self, row: int, sequence: ActiveSequence) -> int:
        """How many tokens in a row a request can start from; the last of its prompt are left to compute.

        Only what was, or is being, kept for other requests of its scope counts, and only for a request that keeps its
        own; and what was rotated by another rotary table than its prompt's doesn't.
        """
        if not sequence.reuses_cache or self._table_in(row) != self._table_of(sequence):
            return 0
        scope, tokens = self._content(row)
        return _common_beginning(tokens, sequence.cache_keys) if scope == sequence.request.cache_scope else 0

    def _table_in(self, row: int) -> int:
        """The rotary table of what a row holds."""
        occupant = self._rows[row]
        return self._held[row].rotary_table if occupant is None else self._table_of(occupant)

    def _table_of(self, sequence: ActiveSequence) -> int:
        """The rotary table of a request: its prompt's, which the output keeps."""
        return rotary_table(self._rotary_length, len(sequence.prompt_ids))

    def _content(self, row: int) -> tuple[int | None, list[int]]:
        """The scope whose requests may start from a row, and its tokens; None: nobody may."""
        occupant = self._rows[row]
        if occupant is None:
            return self._held[row].scope, self._held[row].tokens
        if not occupant.request.keep_cache:
            return None, []
        tokens = (occupant.cache_keys + occupant.token_ids)[: int(self._engine.cache_length[row])]
        return occupant.request.cache_scope, tokens

    def _follows(self, sequence: ActiveSequence) -> bool:
        """Whether a prompt in prefill begins as a request does, goes on so, and no row has more of that by now."""
        if not sequence.reuses_cache:
            return False
        for row in self._prefilling:
            other = self._occupant(row)
            if not other.reuses_cache or other.request.cache_scope != sequence.request.cache_scope:
                continue
            if self._table_of(other) != self._table_of(sequence):
                continue
            common = _common_beginning(other.cache_keys, sequence.cache_keys)
            done = other.prefilled_tokens
            if common < CHUNK_BESIDE_DECODE or common <= done:
                continue
            if not any(self._shares_more(each, sequence, done) for each in range(len(self._rows))):
                return True
        return False

    def _shares_more(self, row: int, sequence: ActiveSequence, tokens: int) -> bool:
        """Whether `_shared` is more than so many tokens, which most rows show by one of them."""
        _, content = self._content(row)
        is_likely = len(content) > tokens and content[tokens] == sequence.cache_keys[tokens]
        return is_likely and self._shared(row, sequence) > tokens

    def _retire_cancelled(self) -> list[Event]:
        events: list[Event] = []
        for sequence in [s for s in self._waiting if s.is_cancelled]:
            self._waiting.remove(sequence)
            events.append(sequence.finish(FinishReason.CANCELLED))
        for row, running in enumerate(self._rows):
            if running is not None and running.is_cancelled:
                events.append(self._retire(row, running.finish(FinishReason.CANCELLED)))
        for index, pending in list(self._pending.items()):
            if pending.is_cancelled:
                events += [sequence.finish(FinishReason.CANCELLED) for sequence in self._pending.pop(index).take_all()]
        return events

    def _retire(self, row: int, completion: Completion) -> Completion:
        """Frees a row whose request has ended."""
        sequence = self._vacate(row)
        self._next[row] = _IDLE
        if sequence.request.keep_cache:
            length = int(self._engine.cache_length[row])
            tokens = (sequence.cache_keys + sequence.token_ids)[:length]
            self._left += 1
            scope, table = sequence.request.cache_scope, self._table_of(sequence)
            self._held[row] = _Held(tokens, scope, self._left, table) if tokens else _NOTHING
        else:
            self._forget(row)
        return completion

    def _fail(self, row: int, error: GenerationError) -> list[Event]:
        """Frees a row whose step failed, and what it held; without another row, choices that are left fail too."""
        sequence = self._vacate(row)
        self._forget(row)
        failed = [sequence]
        if sequence.index in self._pending and not any(each and each.index == sequence.index for each in self._rows):
            failed += self._pending.pop(sequence.index).take_all()
        return [each.fail(error) for each in failed]

    def _vacate(self, row: int) -> ActiveSequence:
        sequence = self._occupant(row)
        self._rows[row] = None
        if row in self._prefilling:
            self._prefilling.remove(row)
        return sequence

    def _forget(self, row: int) -> None:
        self._held[row] = _NOTHING
        self._next[row] = _IDLE
        self._engine.truncate(row, 0)

    def _complete(self, request: Request, *, room: int) -> GenerationConfig:
        return self._defaults.complete(request.config, is_chat=request.is_chat, room=room)


def _common_beginning(content: list[int], prompt: list[int]) -> int:
    """How many tokens of a prompt begin another list too, but for those that are always computed."""
    low, high = 0, max(0, min(len(content), len(prompt) - ALWAYS_COMPUTED))
    while low < high:  # by halves: parts are compared as wholes, which is faster
        middle = (low + high + 1) // 2
        low, high = (middle, high) if content[low:middle] == prompt[low:middle] else (low, middle - 1)
    return low
