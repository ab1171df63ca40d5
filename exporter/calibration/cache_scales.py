"""Scales of an int8 KV cache: for each channel the largest key and value on sample texts, found layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_aot.errors import ExportError
from qwen_aot.exporter.calibration.decoder_layer import DecoderLayer, load_weights
from qwen_aot.exporter.calibration.hidden_states import HiddenStates
from qwen_aot.exporter.checkpoint.base import Checkpoint

_LARGEST_CODE = 127
_LEAST_SCALE = 1e-30  # a float32 whose reciprocal is one too


@dataclass(frozen=True, slots=True)
class CacheScales:
    """What one code is worth: a cached number is its code, -128 to 127, times the scale of its channel.

    Attributes:
        keys, values: [layers, Hkv * D] float32, above 0.
    """

    keys: NDArray[np.float32]
    values: NDArray[np.float32]


def calibrate_cache(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int64],
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> CacheScales:
    """Runs the model in float32, one layer in memory, and gives the scales by which nothing of it is saturated.

    A key's channels i and i + D/2 are turned into each other by an angle that grows with the position, which the sample
    texts don't reach the end of. So both get the largest length of the pair, which no position exceeds.

    Args:
        checkpoint: the model.
        tokens: [sequences, T] token ids.
        folder: for two files of sequences x T x M float32, which are left there.
        on_progress: called with layers done and layers in all.

    Raises:
        CheckpointError: a tensor can't be read.
        ExportError: a key or value isn't finite.
        OSError: `folder` can't be written.
    """
    config = checkpoint.config
    layers = config.num_hidden_layers
    hidden = HiddenStates(lambda layer: folder / f"hidden-{layer}.npy", (*tokens.shape, config.hidden_size))
    hidden.embed(checkpoint, tokens)
    layer_of = DecoderLayer(config, tokens.shape[1])
    found = []
    on_progress(0, layers)
    for layer in range(layers):
        weights, ranges = load_weights(checkpoint, layer), _Ranges(config.num_key_value_heads, config.head_dim)
        hidden.advance(layer, functools.partial(layer_of, weights, observe_cache=ranges.observe))
        hidden.forget(layer)
        found.append(ranges.scales(f"{checkpoint.path}: layer {layer}"))
        on_progress(layer + 1, layers)
    keys, values = zip(*found, strict=True)
    return CacheScales(np.stack(keys), np.stack(values))


class _Ranges:
    """The largest magnitude of each channel of one layer so far."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self._pairs = torch.zeros(num_heads, head_dim // 2)
        self._values = torch.zeros(num_heads, head_dim)

    def observe(self, keys: Tensor, values: Tensor) -> None:
        """Counts rotated keys and values, each [B, Hkv, T, D]."""
        first, second = keys.chunk(2, dim=-1)
        self._pairs = torch.maximum(self._pairs, torch.hypot(first, second).amax((0, 2)))
        self._values = torch.maximum(self._values, values.abs().amax((0, 2)))

    def scales(self, where: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of keys and of values [Hkv * D]."""
        keys = torch.cat((self._pairs, self._pairs), dim=-1)
        return _scales(keys, f"{where}: a key"), _scales(self._values, f"{where}: a value")


def _scales(largest: Tensor, what: str) -> NDArray[np.float32]:
    """Those by which the largest magnitude is the largest code.

    A channel that was 0 on all texts gets the layer's largest scale, the least likely to saturate what it may hold.
    """
    sizes = largest.reshape(-1).numpy()
    if not np.isfinite(sizes).all():
        raise ExportError(
            f"{what} isn't finite on the sample texts: the weights are damaged, or leave float32's range; accepted for "
            "such a model: --kv-precision auto"
        )
    sizes = np.where(sizes > 0, sizes, sizes.max() or 1)
    scales: NDArray[np.float32] = np.maximum(sizes / np.float32(_LARGEST_CODE), np.float32(_LEAST_SCALE))
    return scales
