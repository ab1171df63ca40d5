"""Driver: the one batch of an engine, lent to one borrower at a time, stepped and closed in turn."""

from __future__ import annotations

import os
import threading

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.engine.exclusive import Exclusive
from qwen_aot.runtime.engine.protocol import Engine
from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import GenerationDefaults
from qwen_aot.runtime.generation.request import Event
from qwen_aot.runtime.text.tokenizer import Tokenizer

__all__ = ["Driver"]


class Driver:
    """Steps a batch for whoever has borrowed it; `close` may come from any thread, or from a signal handler."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, defaults: GenerationDefaults, *, speculate: bool = True
    ) -> None:
        """Takes over the engine; see `Batch`."""
        self._engine = engine
        self._batch = Batch(engine, tokenizer, defaults, speculate=speculate)
        self._lent = threading.Lock()
        self._borrower = ""
        self._stepping = Exclusive()  # held during a step: logits lie in the engine's memory until it ends
        self._process = os.getpid()
        self._is_closed = False

    @property
    def batch(self) -> Batch:
        """The batch; only `step` may step it."""
        return self._batch

    def borrow(self, borrower: str) -> None:
        """Gives the batch to a borrower, empty and with indices from 0.

        Args:
            borrower: what others are told while it has the batch, and what they can do.

        Raises:
            GenerationError: another has it.
        """
        self.check_process()
        if not self._lent.acquire(blocking=False):
            raise GenerationError(self._borrower)
        self._borrower = borrower
        self._batch.restart()

    def give_back(self) -> None:
        """Ends the loan; what is left in the batch is dropped, and its rows emptied."""
        try:
            if not self._batch.is_idle:
                self._batch.clear()
        finally:
            self._lent.release()

    def step(self) -> list[Event]:
        """See `Batch.step`.

        Raises:
            GenerationError: it was closed, this is another process, or this thread is in a step.
        """
        self.check_process()
        with self._stepping:
            if self._is_closed:
                raise GenerationError("the engine is closed; open the bundle again")
            return self._batch.step()

    def close(self) -> None:
        """Closes the engine once no step runs; from a signal handler that interrupted one, when that ends."""
        self._stepping.run(self._close)

    def check_process(self) -> None:
        """Refuses a process that was forked from the one that opened the engine.

        Raises:
            GenerationError: the threads of the engine and of the batch aren't in it.
        """
        if os.getpid() != self._process:
            raise GenerationError(
                f"the bundle was opened in process {self._process}, and this is {os.getpid()}, forked from it without "
                "its threads: open it in each process, or start processes with multiprocessing's 'spawn'"
            )

    def _close(self) -> None:
        self._is_closed = True
        self._engine.close()
