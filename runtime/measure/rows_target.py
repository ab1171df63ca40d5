"""The rows of a bundle, as the target of a load: requests to a GenerationService in this process."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import DeployError
from qwen_aot.runtime.generation.config import GenerationConfig
from qwen_aot.runtime.generation.request import Completion, Request
from qwen_aot.runtime.generation.service import GenerationService
from qwen_aot.runtime.measure.outcome import Answer, Failure, FailureKind, Outcome

__all__ = ["RowsTarget"]


class RowsTarget:
    """Greedy answers of a length, whatever they say."""

    def __init__(self, service: GenerationService, prompt_tokens: int, gen_tokens: int) -> None:
        """Sends to a service.

        Args:
            service: open; the caller closes it.
            prompt_tokens: of a prompt; with the answer they fit the context.
            gen_tokens: of an answer, at least 1.
        """
        self._service = service
        self._prompt_tokens = prompt_tokens
        self._config = GenerationConfig(max_new_tokens=gen_tokens, ignore_eos=True, stop=())

    def prompts(self, count: int, draws: np.random.Generator) -> list[NDArray[np.int64]]:
        """So many prompts of random token ids, [prompt_tokens] each."""
        vocabulary = self._service.generator.engine.manifest.model.vocab_size
        return list(draws.integers(0, vocabulary, (count, self._prompt_tokens)))

    async def ask(self, prompt: NDArray[np.int64], start: float) -> Outcome:
        """See `drive.Target`."""
        pieces: list[float] = []
        completion: Completion | None = None
        try:
            async for event in self._service.submit(Request(prompt.tolist(), self._config)):
                if isinstance(event, Completion):
                    completion = event
                else:
                    pieces.append(time.perf_counter())
        except DeployError as error:
            return Failure(FailureKind.ENGINE, str(error), start, time.perf_counter())
        assert completion is not None and len(pieces) == len(completion.token_ids)
        return Answer(start, tuple(pieces), time.perf_counter(), completion.prompt_tokens, len(pieces))
