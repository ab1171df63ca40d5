"""CompileQueue: grammars are compiled beside the event loop, few at once, and each only for so long."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import anyio

from qwen_aot.runtime.server.constraints.compiler import CompiledGrammar, GrammarCompiler, GrammarError
from qwen_aot.runtime.server.constraints.grammar import Grammar
from qwen_aot.runtime.server.errors import ApiError, queue_full

__all__ = ["CompileQueue"]

COMPILE_THREADS = 2
COMPILE_SECONDS = 3.0  # for one grammar; published schemas take some 10 ms
WAIT_SECONDS = 10.0  # for a thread
MAX_PENDING = 16  # that are compiled or wait for it


class CompileQueue:
    """Two threads that compile.

    What runs there can't be interrupted: a grammar that is given up is compiled to its end, which llguidance's limits
    set, and until then its thread is taken.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(COMPILE_THREADS, "qwen-aot-compile")
        self._lock = threading.Lock()
        self._pending = 0

    async def compile(self, compiler: GrammarCompiler, grammar: Grammar) -> CompiledGrammar:
        """Compiles a grammar.

        Args:
            compiler: of the model.
            grammar: to compile.

        Raises:
            ApiError: it can't be compiled, or not in time (400); or too many wait (429).
        """
        with self._lock:
            if self._pending >= MAX_PENDING:
                raise queue_full("too many JSON schemas wait to be compiled")
            self._pending += 1
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def work() -> CompiledGrammar:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(begun.set)
            return compiler.compile(grammar)

        future = self._threads.submit(work)
        future.add_done_callback(self._ended)
        try:
            with anyio.fail_after(WAIT_SECONDS):
                await begun.wait()
        except TimeoutError:
            future.cancel()
            raise queue_full("too many JSON schemas are being compiled") from None
        try:
            with anyio.fail_after(COMPILE_SECONDS):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            message = (
                f"{grammar.where} isn't compiled within {COMPILE_SECONDS:g} s: simplify its schemas (patterns, long "
                "lists, many optional properties)"
            )
            raise ApiError(400, message, code="invalid_value", param=grammar.where) from None
        except GrammarError as error:
            message = f"{error.where} can't be used: {error.reason}; docs/serving.md has what a schema may say"
            raise ApiError(400, message, code="invalid_value", param=error.where) from None

    def close(self) -> None:
        """Lets the threads go; what they are doing ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ended(self, _: Future[CompiledGrammar]) -> None:
        with self._lock:
            self._pending -= 1
