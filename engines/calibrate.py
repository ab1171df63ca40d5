"""Finds the scales of an int8 KV cache before a bundle is built, and again when it is verified: always the same way."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qwen_aot.engines.bundle.resources import threads_for
from qwen_aot.engines.bundle.stages import Advance
from qwen_aot.errors import BuildError
from qwen_aot.exporter.calibration.cache_scales import calibrate_cache
from qwen_aot.exporter.calibration.texts import calibration_texts
from qwen_aot.exporter.calibration.windows import draw_windows, random_windows
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.lowering.ort.int8_cache import set_scales
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import layer_kinds
from qwen_aot.exporter.weights.recipe import Traced

_TOKENS, _LENGTH, _SEED = 4096, 512, 0  # docs/quantization.md has what fewer and more tokens give
_ACTIVATION_TOKENS = 2048  # computed at once


def calibration_windows(
    checkpoint: Checkpoint,
    *,
    texts: Sequence[str] = (),
    tokens: int = _TOKENS,
    length: int = _LENGTH,
    seed: int = _SEED,
    why: str = "and an int8 cache gets its scales from sample texts; put the model's beside it, or leave out "
    "--kv-precision int8",
) -> NDArray[np.int64]:
    """Token ids of texts [sequences, T]; of random weights, random ones.

    Args:
        checkpoint: whose tokenizer reads them.
        texts: one string a work; empty: the project's own.
        tokens: in all.
        length: of a sequence, at most; less where the model's context is shorter.
        seed: of the drawing.
        why: a tokenizer is needed, and what else to do; the end of the error without one.

    Raises:
        BuildError: the checkpoint has no tokenizer to read texts with.
        ExportError: the texts are too short, or its tokenizer isn't of its model.
    """
    config = checkpoint.config
    length = min(length, config.max_position_embeddings)
    content = checkpoint.tokenizer.files.get("tokenizer.json")
    if content is None and isinstance(checkpoint, RandomCheckpoint):
        return random_windows(config.vocab_size, tokens=tokens, length=length, seed=seed)
    if content is None:
        raise BuildError(f"{checkpoint.path} has no tokenizer.json, {why}")
    chosen = texts or [sample.text for sample in calibration_texts()]
    return draw_windows(content, chosen, config.vocab_size, tokens=tokens, length=length, seed=seed)


def set_cache_scales(
    lowered: Traced, checkpoint: Checkpoint, windows: NDArray[np.int64], advance: Advance, threads: int | None = None
) -> None:
    """Finds the scales of every layer, and gives them to the graph.

    Args:
        lowered: a graph whose cache is int8 with calibrated scales.
        checkpoint: the model.
        windows: of `calibration_windows`.
        advance: called with layers done and in all.
        threads: that compute at most; None: one for each core that this process may use.

    Raises:
        DeployError: the checkpoint can't be read, or its keys and values aren't finite.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads_for(threads))
    try:
        with tempfile.TemporaryDirectory(prefix="qwen-aot-calibration-") as folder:
            set_scales(lowered, calibrate_cache(checkpoint, windows, Path(folder), advance))
    finally:
        torch.set_num_threads(before)


def calibration_bytes(config: ModelConfig) -> int:
    """Memory that it takes: the largest layer in float32, and what some sequences make of it."""
    layer = max(sum(4 * _size(each.shape) for each in parameters) for _, parameters in layer_kinds(config))
    widest = max(config.intermediate_size, config.query_size, config.hidden_size)
    return layer + 4 * _ACTIVATION_TOKENS * (6 * config.hidden_size + 3 * widest)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
