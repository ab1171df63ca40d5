"""Generator: prompts in, tokens and text out, over one engine."""

from __future__ import annotations

import contextlib
import threading
from collections import abc
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from qwen_aot.errors import GenerationError
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.engine.exclusive import Exclusive
from qwen_aot.runtime.engine.protocol import Engine
from qwen_aot.runtime.generation.batch import Batch
from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
from qwen_aot.runtime.generation.request import Completion, Event, Request
from qwen_aot.runtime.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["EventStream", "Generator"]

EventStream: TypeAlias = abc.Generator[Event, None, None]  # an iterator that can be closed


class Generator:
    """Generates from prompts; a context manager. One stream at a time; `close` may come from any thread.

    Example:
        >>> with Generator.open("bundle") as generator:
        ...     config = generator.defaults.resolve(max_new_tokens=32)
        ...     print(generator.generate(["The capital of France is"], config)[0].text)
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None = None, defaults: GenerationDefaults | None = None
    ) -> None:
        """Takes over an engine; `close` closes it.

        Args:
            engine: nothing else may drive it meanwhile.
            tokenizer: None: prompts are token ids and there is no text.
            defaults: None: greedy, ending at the model's own ids.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._defaults = defaults or GenerationDefaults(eos_token_ids=engine.manifest.model.eos_token_ids)
        self._batch = Batch(engine, tokenizer)
        self._streaming = threading.Lock()  # held by the one stream that runs
        self._stepping = Exclusive()  # held during a step: logits lie in the engine's memory until it ends

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        skip_hash_above: int | None = None,
        allow_bundle_code: bool = False,
    ) -> Generator:
        """Opens a bundle.

        Args:
            path: the bundle's folder.
            threads: CPU threads; None: see `machine.usable_cores`.
            skip_hash_above: see `runtime.bundle.load.load_bundle`.
            allow_bundle_code: let the bundle run native code that isn't this machine's own; for bundles of people whose
                programs you would run. Also: the variable QWEN_AOT_ALLOW_BUNDLE_CODE=1.

        Raises:
            BundleError: the bundle is damaged.
            EngineMismatchError: this machine can't run it, or it has code that isn't allowed.
        """
        bundle = load_bundle(path, skip_hash_above=skip_hash_above)
        tokenizer = load_tokenizer(bundle)
        defaults = GenerationDefaults.from_bundle(bundle)
        engine = open_engine(bundle, threads=threads, allow_bundle_code=allow_bundle_code)
        return cls(engine, tokenizer, defaults)

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, if the bundle has one."""
        return self._tokenizer

    @property
    def defaults(self) -> GenerationDefaults:
        """What the bundle says about generation."""
        return self._defaults

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        config: GenerationConfig | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> list[Completion]:
        """Generates from several prompts, as many at once as the engine has rows.

        Args:
            prompts: texts or lists of token ids.
            config: for all of them; None: the bundle's defaults.
            cancel: set it to end all of them.

        Returns:
            One completion for each prompt, in their order.

        Raises:
            GenerationError: a prompt can't be taken (nothing has run), or a request failed; `stream` gives the
                results of the others.
        """
        if isinstance(prompts, str):
            raise GenerationError(f"prompts is the text {prompts!r}; accepted: a list of prompts, such as [text]")
        config = config or self._defaults.resolve()
        requests = [Request(prompt, config, cancel) for prompt in prompts]
        with contextlib.closing(self.stream(requests)) as events:
            completions = [event for event in events if isinstance(event, Completion)]
        return sorted(completions, key=lambda completion: completion.index)

    def stream(self, requests: Sequence[Request]) -> EventStream:
        """Generates token by token; each request's last event is its Completion.

        All requests are checked before any runs. Closing the stream cancels what isn't finished. A request that
        fails by itself gets a Completion with the error; when the others are done, the first such error is
        raised.

        Raises:
            GenerationError: a request can't be taken or failed, a step failed, or another stream isn't finished.
            ContextFullError: a prompt is longer than the context.
        """
        prompts = [self._batch.tokenize(request) for request in requests]
        return self._stream(requests, prompts)

    def _stream(self, requests: Sequence[Request], prompts: list[list[int]]) -> EventStream:
        errors: list[GenerationError] = []
        is_ours = False
        try:
            is_ours = self._streaming.acquire(blocking=False)
            if not is_ours:
                raise GenerationError("another stream of this generator isn't finished: end it or close it first")
            self._batch.restart()
            for request, ids in zip(requests, prompts, strict=True):
                self._batch.add(request, ids)
            while not self._batch.is_idle:
                with self._stepping:
                    events = self._batch.step()
                for event in events:
                    if isinstance(event, Completion) and event.error is not None:
                        errors.append(event.error)
                    yield event
        except GeneratorExit:  # closed between two steps, when all rows are whole
            self._batch.abandon()
            raise
        finally:
            if is_ours:
                if not self._batch.is_idle:
                    self._batch.clear()
                self._streaming.release()
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Closes the engine once no step runs; a stream that isn't finished fails at its next one.

        From a signal handler that interrupted a step, it is done when that step ends.
        """
        self._stepping.run(self._engine.close)

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
