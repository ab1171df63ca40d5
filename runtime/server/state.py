"""ServerState: the one model of a server, who may use it now, and where its slow work is done."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qwen_aot.errors import DeployError
from qwen_aot.runtime.backends.cpu.kernels import kernels_of
from qwen_aot.runtime.engine.vision_table import vision_table
from qwen_aot.runtime.generation.constraint import ConstraintSource
from qwen_aot.runtime.generation.generator import Generator
from qwen_aot.runtime.generation.handle import RequestHandle
from qwen_aot.runtime.generation.pending import PendingRequest
from qwen_aot.runtime.generation.request import Request
from qwen_aot.runtime.generation.service import GenerationService
from qwen_aot.runtime.server.constraints.compile_queue import CompileQueue
from qwen_aot.runtime.server.constraints.compiler import GrammarCompiler
from qwen_aot.runtime.server.constraints.grammar import Grammar
from qwen_aot.runtime.server.errors import ApiError, draining, loading, of_request, queue_full
from qwen_aot.runtime.server.settings import ServerSettings
from qwen_aot.runtime.text.image_tokens import ImageTokens

__all__ = ["Model", "Phase", "ServerState"]

T = TypeVar("T")

# Texts are tokenized and templates rendered by so many threads at once; others wait.
PREPARING_THREADS = 2
MAX_PREPARING = 32  # that wait for these threads, besides those that were admitted


class Phase(enum.Enum):
    """Of a server's life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # what was admitted goes on, nothing else is taken
    STOPPED = "stopped"  # what was at work has been cut off


class Model:
    """An open bundle, and the names that clients know it by."""

    def __init__(self, generator: Generator, settings: ServerSettings) -> None:
        """Starts to serve it.

        Args:
            generator: lent to the service; it has a tokenizer.
            settings: the server's.
        """
        manifest = generator.engine.manifest
        self.generator = generator
        self.names = tuple(dict.fromkeys(settings.model_names)) or (manifest.model.name,)
        self.tool_format = settings.tool_format
        self.created = int(time.time())
        self.rows = manifest.max_batch
        self.max_context = manifest.max_context
        self.vocab_size = manifest.model.vocab_size
        self.image_tokens = _image_tokens(generator)
        self.kernels = kernels_of(
            manifest
        )  # whose run it: "own", "onnxruntime"; None: they are compiled into the engine
        assert generator.tokenizer is not None
        # Characters; of byte-level tokens bytes.
        self.longest_token = max(map(len, generator.tokenizer.backend.get_vocab()), default=1)
        self.grammars = GrammarCompiler(generator.tokenizer, self.vocab_size)
        # `ServerState.admit` decides who may wait. A row that was cancelled is free only after its step, so that the
        # service may see some more for a moment.
        self.service = GenerationService(generator, max_waiting=4 * (manifest.max_batch + settings.max_queue))


def _image_tokens(generator: Generator) -> int | None:
    """Of the context, that an image takes; None: the model can't be shown any."""
    if not generator.takes_images:
        return None
    try:
        return len(ImageTokens.of(generator.tokenizer).span(vision_table(generator.engine.manifest).rows))
    except DeployError:
        return None  # whoever sends one is told why


class ServerState:
    """Belongs to one event loop, which alone calls it."""

    def __init__(self, settings: ServerSettings) -> None:
        """Starts in the phase LOADING; see `start`."""
        self.settings = settings
        self.phase = Phase.LOADING
        self.admitted = 0  # choices
        self._model: Model | None = None
        self._handles: set[RequestHandle] = set()
        self._submitting = 0  # requests that aren't submitted yet
        self._preparing = 0  # pieces of work for the threads
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, "qwen-aot-prepare")
        # One: pictures cost memory, and the vision engine runs one batch at a time. Texts don't wait behind them.
        self._encoding = ThreadPoolExecutor(1, "qwen-aot-images")
        self._compiling = CompileQueue()

    def start(self, generator: Generator) -> Model:
        """Takes requests from now on, unless the server is stopping by now."""
        self._model = Model(generator, self.settings)
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY
        return self._model

    @property
    def loaded(self) -> Model | None:
        """The model, whatever the phase; None before it is loaded."""
        return self._model

    @property
    def model(self) -> Model:
        """The model, for a request that needs it.

        Raises:
            ApiError: 503.
        """
        if self.phase is Phase.LOADING:
            raise loading()
        if self._model is None or self.phase is not Phase.READY or not self._model.service.statistics().is_accepting:
            raise draining()
        return self._model

    @contextlib.contextmanager
    def admit(self, choices: int) -> Iterator[None]:
        """Counts a request among those that run or wait, until its last choice is answered.

        Args:
            choices: of all its prompts.

        Raises:
            ApiError: it can't ever be taken (400), or not now (429, 503).
        """
        model = self.model
        most = model.rows + self.settings.max_queue
        if choices > most:
            raise ApiError(
                400,
                f"the request asks for {choices} answers; accepted: at most {most} (prompts times n)",
                code="invalid_value",
                param="prompt",
            )
        if self.admitted + choices > most:
            raise queue_full(f"{self.admitted} answers are at work or wait, and at most {most} may")
        self.admitted += choices
        try:
            yield
        finally:
            self.admitted -= choices

    async def prepare(self, work: Callable[[], T]) -> T:
        """Runs in a thread what may take long: tokenizing, templates.

        Raises:
            ApiError: it raised a DeployError, which is the request's; or too much of it waits.
        """
        if self._preparing >= MAX_PREPARING + self.admitted:
            raise queue_full("too many texts wait to be tokenized")
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except DeployError as error:
            raise of_request(error) from error
        finally:
            self._preparing -= 1

    async def compile(self, model: Model, grammar: Grammar | None) -> ConstraintSource | None:
        """See `CompileQueue.compile`; None: there is nothing to compile."""
        if grammar is None:
            return None
        self._submitting += 1
        try:
            return await self._compiling.compile(model.grammars, grammar)
        finally:
            self._submitting -= 1

    async def submit(
        self,
        model: Model,
        make: Callable[[], list[PendingRequest]],
        *,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[RequestHandle]:
        """Submits the requests that `make` gives in a thread, with their pictures encoded: all of them, or none.

        Args:
            model: what is asked.
            make: may refuse them; runs before any picture is decoded.
            is_cancelled: asked in a thread, between pictures: whether nobody waits any more.

        Raises:
            ApiError: one can't be taken.
        """

        def submit_all(requests: Iterable[Request]) -> list[RequestHandle]:
            handles: list[RequestHandle] = []
            try:
                handles.extend(model.service.submit(request) for request in requests)
            except BaseException:
                for handle in handles:
                    handle.cancel()
                raise
            return handles

        def begin() -> tuple[list[PendingRequest], list[RequestHandle]]:
            made = make()
            if any(pending.pictures for pending in made):
                return made, []
            return [], submit_all(pending.request for pending in made)

        def encode_and_submit() -> list[RequestHandle]:
            def is_over() -> bool:
                return self.phase is Phase.STOPPED or is_cancelled()

            return submit_all(
                [model.generator.encode_images(pending, is_cancelled=is_over) for pending in with_pictures]
            )

        self._submitting += 1
        try:
            with_pictures, handles = await self.prepare(begin)
            if not with_pictures:
                return handles
            try:
                return await asyncio.get_running_loop().run_in_executor(self._encoding, encode_and_submit)
            except DeployError as error:
                raise draining() if self.phase is Phase.STOPPED else of_request(error) from error
        finally:
            self._submitting -= 1

    @contextlib.contextmanager
    def at_work(self, handles: Sequence[RequestHandle]) -> Iterator[None]:
        """Knows these requests meanwhile, so that `cut` ends them; whatever happens, they are ended behind it."""
        self._handles.update(handles)
        try:
            if self.phase is Phase.STOPPED:
                self.cut()
            yield
        finally:
            self._handles.difference_update(handles)
            for handle in handles:
                handle.cancel()

    def drain(self) -> None:
        """Takes no more requests; those at work go on."""
        if self.phase is not Phase.STOPPED:
            self.phase = Phase.DRAINING

    def cut(self) -> bool:
        """Ends what is at work; whether something was."""
        self.phase = Phase.STOPPED
        unfinished = [handle for handle in self._handles if not handle.is_done]
        for handle in unfinished:
            handle.cancel()
        return bool(unfinished) or self._submitting > 0

    def close(self) -> None:
        """Lets the threads go; what they are doing ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._encoding.shutdown(wait=False, cancel_futures=True)
        self._compiling.close()
