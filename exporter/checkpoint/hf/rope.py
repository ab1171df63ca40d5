"""The rotary embedding in a config.json: `rope_scaling` beside `rope_theta`, or the newer `rope_parameters`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config_keys import ROPE_KEYS
from qwen_aot.exporter.checkpoint.hf.config_values import count, flag, number
from qwen_aot.exporter.model.config import RopeScaling
from qwen_aot.exporter.model.rope import yarn_attention_factor

logger = logging.getLogger(__name__)

_SPELLINGS = ("rope_scaling", "rope_parameters")
_DEFAULT_THETA = 10000.0
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_KNOWN = _COMMON.union(*ROPE_KEYS.values())

_Rope = tuple[float, RopeScaling | None]


def read_rope(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None, int]:
    """(rope_theta, scaling, tokens of context).

    Args:
        raw: the parsed config.json.
        max_positions: its max_position_embeddings.

    Raises:
        CheckpointError: a value is not supported, or both spellings are there and mean different things.
    """
    found: dict[str, _Rope] = {}
    for spelling in _SPELLINGS:
        rope = _object(raw, spelling)
        if rope:
            found[spelling] = _read(raw, rope, max_positions)
    if len(set(found.values())) > 1:
        raise CheckpointError(
            f"rope_scaling is {raw['rope_scaling']} and rope_parameters is {raw['rope_parameters']}; accepted: one of "
            "them, or two that mean the same. Keep the one that is meant, with its rope_theta."
        )
    theta, scaling = next(iter(found.values()), (number(raw, "rope_theta", _DEFAULT_THETA), None))
    return theta, scaling, max_positions if scaling is None else scaling.context_for(max_positions)


def _object(raw: Mapping[str, Any], spelling: str) -> Mapping[str, Any]:
    """The object under one of the spellings, without the nesting by layer type of transformers 5."""
    rope = raw.get(spelling) or {}
    if isinstance(rope, Mapping) and "full_attention" in rope:
        others = [kind for kind in rope if rope[kind] != rope["full_attention"]]
        if others:
            raise CheckpointError(
                f"{spelling} has {others[0]!r} beside 'full_attention': {rope[others[0]]!r}; not supported; accepted: "
                "one rotary embedding for all layers"
            )
        rope = rope["full_attention"] or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{spelling} is {rope!r}; accepted: an object or null")
    return rope


def _read(raw: Mapping[str, Any], rope: Mapping[str, Any], max_positions: int) -> _Rope:
    theta = number(rope, "rope_theta", number(raw, "rope_theta", _DEFAULT_THETA))
    kind = _type(rope)
    if rope.get("partial_rotary_factor") not in (1, None):
        raise CheckpointError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}; accepted: 1")
    unknown = sorted(key for key in rope if key not in _KNOWN)
    if unknown:
        raise CheckpointError(
            f"rope_scaling of type {kind!r} has {unknown[0]!r}; not supported; accepted: "
            f"{', '.join(sorted(ROPE_KEYS[kind])) or 'no other keys'}"
        )
    idle = sorted(rope.keys() - ROPE_KEYS[kind] - _COMMON - {"factor"})
    if idle:
        logger.warning("rope_scaling of type %r doesn't use %s; as in transformers", kind, ", ".join(idle))
    return theta, _READERS[kind](raw, rope, max_positions)


def _type(rope: Mapping[str, Any]) -> str:
    kinds = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise CheckpointError(f"rope_type is {kinds[0]!r} and type is {kinds[1]!r}; accepted: one of them")
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise CheckpointError(
            f"rope_type is {kind!r}; not supported; accepted: {', '.join(ROPE_KEYS)}. "
            "Remove rope_scaling (rope_parameters.rope_type) to serve the model at its trained context."
        )
    return kind


def _original(raw: Mapping[str, Any], rope: Mapping[str, Any], max_positions: int) -> int:
    """Tokens of the context before scaling; what stands beside the rotary object counts before what stands in it."""
    key = "original_max_position_embeddings"
    return count(rope if raw.get(key) is None else raw, key, max_positions)


def _yarn(raw: Mapping[str, Any], rope: Mapping[str, Any], max_positions: int) -> RopeScaling:
    original = _original(raw, rope, max_positions)
    factor = number(rope, "factor", max_positions / max(original, 1))
    if rope.get("truncate", True) is None:  # to transformers null is false, to a reader it is the default
        raise CheckpointError("rope_scaling.truncate is null; accepted: true or false, or nothing for true")
    return RopeScaling(
        "yarn",
        factor,
        attention_factor=_yarn_attention_factor(rope, factor),
        original_max_position_embeddings=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        truncate=flag(rope, "truncate", True),
    )


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        whole = yarn_attention_factor(factor, number(rope, "mscale_all_dim"))
        if whole == 0:
            raise CheckpointError(f"rope_scaling.mscale_all_dim is {rope['mscale_all_dim']!r}; accepted: 0 or more")
        return yarn_attention_factor(factor, number(rope, "mscale")) / whole
    return yarn_attention_factor(factor)


def _llama3(raw: Mapping[str, Any], rope: Mapping[str, Any], max_positions: int) -> RopeScaling:
    return RopeScaling(
        "llama3",
        number(rope, "factor"),
        original_max_position_embeddings=_original(raw, rope, max_positions),
        low_freq_factor=number(rope, "low_freq_factor"),
        high_freq_factor=number(rope, "high_freq_factor"),
    )


def _linear(raw: Mapping[str, Any], rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    factor = number(rope, "factor")
    return None if factor == 1 else RopeScaling("linear", factor)


_READERS = {"default": lambda *_: None, "linear": _linear, "yarn": _yarn, "llama3": _llama3}
