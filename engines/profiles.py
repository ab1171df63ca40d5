"""Optimization profiles: the ranges of input shapes that an engine is made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_aot.engines.spec.build_spec import IMAGES_OF_RUN, BuildSpec
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.experts import gather_limit
from qwen_aot.exporter.model.io_spec import TensorSpec
from qwen_aot.runtime.bundle.manifest import VERIFY, Profile

Ranges = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # of inputs: least, typical, most

_PREFILL = "prefill"
_TYPICAL_WINDOW = 1024  # tokens that kernels are chosen for, if the cache has as many


def profiles(prefill_chunk: int, logits_rows: int | None = None) -> tuple[Profile, ...]:
    """Prefill takes a chunk or less of one row; decode one token of each row; verify up to `logits_rows` of each."""
    steps = (
        Profile(name=_PREFILL, min_tokens=1, max_tokens=prefill_chunk),
        Profile(name="decode", min_tokens=1, max_tokens=1),
    )
    return steps if logits_rows is None else (*steps, Profile(VERIFY, min_tokens=2, max_tokens=logits_rows))


def profile_shapes(inputs: Sequence[TensorSpec], profile: Profile, max_batch: int, capacity: int) -> Ranges:
    """Smallest, typical and largest shape of every input that has a letter among its dimensions.

    The runtime prefills one row at a time, decodes all of them at once, and checks drafted tokens of all of them. Only
    that last step asks for the logits of more than one token a row: of all that it has.
    """
    rows = 1 if profile.name == _PREFILL else max_batch
    least, most = (profile.min_tokens, profile.max_tokens) if profile.name == VERIFY else (1, 1)
    window = min(_TYPICAL_WINDOW, capacity)
    # Only prefill takes rows from images: no more than it has tokens.
    images = profile.max_tokens if profile.name == _PREFILL else 1
    sizes = (
        {"B": 1, "S": profile.min_tokens, "W": 1, "T": least, "I": 1},
        {"B": rows, "S": profile.max_tokens, "W": max(window, profile.max_tokens), "T": most, "I": images},
        {"B": rows, "S": profile.max_tokens, "W": capacity, "T": most, "I": images},
    )
    return {
        spec.name: (_shape(spec, sizes[0]), _shape(spec, sizes[1]), _shape(spec, sizes[2]))
        for spec in inputs
        if any(isinstance(dim, str) for dim in spec.dims)
    }


def decoder_steps(inputs: Sequence[TensorSpec], spec: BuildSpec, capacity: int) -> Mapping[str, Ranges]:
    """`profile_shapes` of each of the decoder's steps, by its name."""
    return {
        profile.name: profile_shapes(inputs, profile, spec.max_batch, capacity)
        for profile in profiles(spec.prefill_chunk, spec.speculate)
    }


def vision_shapes(inputs: Sequence[TensorSpec]) -> Ranges:
    """Smallest, typical and largest shape of the vision engine's inputs: from one image to IMAGES_OF_RUN."""
    least, most = {"B": 1}, {"B": IMAGES_OF_RUN}
    return {spec.name: (_shape(spec, least), _shape(spec, least), _shape(spec, most)) for spec in inputs}


def most_gathered_tokens(config: ModelConfig, spec: BuildSpec) -> int | None:
    """Up to how many tokens a compiled engine's step gathers its experts' weights; None: by their cost alone.

    `gather_limit`, but less than the most tokens of any profile in which their number varies: TensorRT-RTX 1.7.1 fails
    on a branch that a profile always takes although its condition is computed ("producer does not dominate the use").
    """
    if config.moe is None or not spec.facts.compiles:
        return None
    limit = gather_limit(config.moe)
    for step in profiles(spec.prefill_chunk, spec.speculate):
        most = step.max_tokens * (1 if step.name == _PREFILL else spec.max_batch)
        if step.min_tokens < most <= limit:
            limit = most - 1
    return max(1, limit)


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims)
