"""Exact bytes of an engine's weights and cache, and how large its file may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.runtime.bundle.manifest import CACHE_PREFIX, EngineEntry, IoTensor, Manifest, TensorRtFacts

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

# An engine is its weights, kernels and tables. Within 10 % of the weights, and these bytes more. TensorRT-RTX 1.7.1
# adds 5 to 7 MB to a dense network of 2 layers, 12 MB to one with experts, 28 MB to one of 24 layers, 34 of 30, 46 of
# 40, whatever their width, precision and number of compute capabilities; a third profile adds half as much again.
_TOLERANCE = 0.1
_KERNEL_BYTES = 12_000_000
_KERNEL_BYTES_PER_LAYER = 1_200_000

# An engine that tells its constants has the weights and some small ones of the graph: indices, scales, parts of rotary
# tables. TensorRT-RTX 1.7.1 told at most 0.1 % more than the weights; fewer where matrices are equal, which it stores
# once.
_STORED_TOLERANCE = 0.001
_STORED_BYTES = 1_000_000


def weight_bytes(lowered: Traced) -> int:
    """Of all weights as they are stored, exact; without the padding of their file."""
    return sum(output.nbytes for recipe in lowered.recipes.values() for output in recipe.outputs)


def cache_bytes(inputs: Sequence[IoTensor], max_batch: int) -> int:
    """Of the whole KV cache, exact: past and present share it."""
    return sum(
        _ELEMENT_BYTES[tensor.dtype] * math.prod(max_batch if dim == "B" else int(dim) for dim in tensor.shape)
        for tensor in inputs
        if tensor.name.startswith(CACHE_PREFIX)
    )


def engine_size_bounds(
    facts: TensorRtFacts, num_hidden_layers: int, library_bytes: int = 0, num_profiles: int = 2
) -> tuple[int, int]:
    """The least and the most bytes that the engine's file may have.

    Args:
        facts: of the manifest.
        num_hidden_layers: of the model.
        library_bytes: of the plugin library, where the engine holds it.
        num_profiles: each has kernels of its own.
    """
    stored = facts.weight_bytes if facts.has_weights else 0
    kernels = (_KERNEL_BYTES + num_hidden_layers * _KERNEL_BYTES_PER_LAYER) * num_profiles // 2
    return int(stored * (1 - _TOLERANCE)), int(stored * (1 + _TOLERANCE)) + kernels + library_bytes


def require_stored_once(stored: int, weights: int) -> None:
    """Refuses an engine that stores its weights in a wider type, or more than once.

    Args:
        stored: bytes of the constants that the engine tells of.
        weights: bytes of the graph's weights.

    Raises:
        BuildError: the first are more by over 0.1 % and 1 MB.
    """
    if stored > weights * (1 + _STORED_TOLERANCE) + _STORED_BYTES:
        raise BuildError(
            f"the engine stores {stored:,} bytes of constants where the weights have {weights:,}: TensorRT stored some "
            "in a wider type, or more than once; choose another precision or --max-batch 1, and please report it"
        )


def check(folder: Path, manifest: Manifest) -> None:
    """Compares each engine's size with its weights': without a GPU an engine can't be opened.

    Not that of one that told its constants: these were compared when it was compiled.

    Raises:
        BuildError: it is so much larger or smaller that the weights can't be stored as asked for.
    """
    text, vision = manifest.engines.text, manifest.engines.vision
    _check_size(folder, manifest, text, manifest.model.num_hidden_layers, len(text.profiles))
    if vision is not None:
        layers = sum(name.endswith(".qkv_proj.weight") for name in vision.weight_hashes or ())
        _check_size(folder, manifest, vision, layers, 1)


def _check_size(folder: Path, manifest: Manifest, engine: EngineEntry, layers: int, num_profiles: int) -> None:
    assert engine.tensorrt is not None
    found = (folder / engine.file).stat().st_size
    plugins = engine.tensorrt.plugins
    library_bytes = manifest.files[plugins.file].bytes if plugins is not None and plugins.in_engine else 0
    low, high = engine_size_bounds(engine.tensorrt, layers, library_bytes, num_profiles)
    if engine.plan is None and not low <= found <= high:
        raise BuildError(
            f"{engine.file} has {found:,} bytes where {low:,} to {high:,} are expected for "
            f"{engine.tensorrt.weight_bytes:,} bytes of {engine.precision} weights: TensorRT stored them in "
            "another precision, or more than once; choose another precision, and please report it"
        )
