"""The reference every bundle is measured against: Hugging Face transformers in fp32, on the CPU."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwen_aot.engines.verify.quantized_model import inputs_as_they_are
from qwen_aot.engines.verify.reference_model import load_model
from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import Checkpoint, encodings_of


class Reference:
    """A transformers model in fp32.

    Attributes:
        read_by: who read the checkpoint's files for it (`engines.verify.reference_model`).
    """

    def __init__(self, checkpoint: Checkpoint, *, rounds_inputs: bool = True) -> None:
        """Loads the whole model.

        Args:
            checkpoint: read here, and not kept.
            rounds_inputs: as a W8A8 checkpoint says; false: its weights' floats, as builds of fp32 and fp16 have them.

        Raises:
            CheckpointError: transformers and the checkpoint's own reader disagree on what it holds.
        """
        self._model, self.read_by = load_model(checkpoint)
        forms = [each.form for each in encodings_of(checkpoint).values()]
        self._rounds_inputs = rounds_inputs and any(form is not None and form.has_input_scale for form in forms)
        self._lengths = (checkpoint.config.logn_attn_length, checkpoint.config.dynamic_ntk_length)

    def logits(self, token_ids: NDArray[np.int64], first: int) -> NDArray[np.float32]:
        """Logits [T - first, V] of positions `first` … T-1 of one sequence [T]."""
        return self._logits(token_ids, first, rounds_inputs=self._rounds_inputs)

    @property
    def unrounded(self) -> Callable[[NDArray[np.int64], int], NDArray[np.float32]] | None:
        """`logits` of the same weights whose inputs aren't rounded; None: this reference rounds none."""
        return functools.partial(self._logits, rounds_inputs=False) if self._rounds_inputs else None

    @torch.inference_mode()
    def _logits(self, token_ids: NDArray[np.int64], first: int, *, rounds_inputs: bool) -> NDArray[np.float32]:
        self._require_length(len(token_ids))
        with contextlib.nullcontext() if rounds_inputs else inputs_as_they_are():
            output = self._model(torch.from_numpy(token_ids)[None], logits_to_keep=len(token_ids) - first)
        logits: NDArray[np.float32] = output.logits[0].numpy()
        return logits

    @torch.inference_mode()
    def greedy(self, prompt: NDArray[np.int64], count: int) -> list[int]:
        """The `count` likeliest tokens one after the other, end-of-text included."""
        self._require_length(len(prompt) + count)
        tokens: list[int] = []
        new, cache = torch.from_numpy(prompt)[None], None
        with contextlib.nullcontext() if self._rounds_inputs else inputs_as_they_are():
            for _ in range(count):
                logits, cache = step(self._model, new, cache, logits_to_keep=1)
                new = logits[:, -1:].argmax(-1)
                tokens.append(int(new))
        return tokens

    def _require_length(self, tokens: int) -> None:
        """Refuses texts of which transformers' model, without log-n scaling and dynamic NTK, says something else.

        Raises:
            CheckpointError: there are more than the trained length.
        """
        longest = min((length for length in self._lengths if length is not None), default=tokens)
        if tokens > longest:
            raise CheckpointError(
                f"a text has {tokens} tokens, and beyond {longest} (seq_length) this model is none that transformers "
                f"has: it is compared with Qwen2's, which is the same up to there; take windows of at most {longest}"
            )


def step(model: Any, token_ids: torch.Tensor, cache: Any = None, **options: Any) -> tuple[torch.Tensor, Any]:
    """One pass of a transformers model that reads a cache and appends to it.

    transformers 5.24 renamed the cache, as an argument and in the output; the name is the one this model takes.

    Args:
        model: a transformers causal language model.
        token_ids: [B, S] int64, the new tokens.
        cache: a transformers cache, such as an earlier step's; None: an empty one.
        options: further arguments of the model's `forward`.

    Returns:
        Logits [B, S, V], and the cache with the new tokens.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    output = model(token_ids, **{name: cache}, use_cache=True, **options)
    return output.logits, output[name]
