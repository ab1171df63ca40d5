"""`dual_chunk_attention_config` of the models for a million tokens: how far it is the same as plain attention.

Tokens are counted in chunks of `chunk_size - local_size`, and a key's position within its chunk. A query sees keys of
its own chunk, and those of the one before it, at their true distance as long as its own position doesn't exceed
`chunk_size`; only keys further away are moved nearer. Keys are scaled by a factor that is 1 up to
`original_max_position_embeddings` tokens. So up to the smaller of both numbers it is plain attention, exactly; beyond
it is another computation, which is not built here (and which transformers doesn't compute either). The sparse attention
that such a file may also name skips what plain attention computes.
Source: `DualChunkRotaryEmbedding` and `DualChunkFlashAttentionImpl` in vLLM; An et al., "Training-Free Long-Context
Scaling of Large Language Models" (arXiv 2402.17463).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config_values import count

logger = logging.getLogger(__name__)

_KEY = "dual_chunk_attention_config"


def exact_context(raw: Mapping[str, Any], context: int, *, is_scaled: bool = False) -> int:
    """Tokens of context over which the model's attention is plain attention.

    Args:
        raw: the parsed config.json.
        context: tokens that it says it has.
        is_scaled: it has a rotary scaling as well.

    Raises:
        CheckpointError: the key holds something else than such a configuration, or both ways to a longer context are
            asked for: nothing says what they are together.
    """
    facts = raw.get(_KEY)
    if facts is None:
        return context
    if not isinstance(facts, dict):
        raise CheckpointError(f"{_KEY} is {facts!r}; accepted: an object, or null")
    if is_scaled:
        raise CheckpointError(f"rope_scaling and {_KEY} are both there; accepted: one of them")
    exact = _positive(facts, "chunk_size")
    if facts.get("original_max_position_embeddings") is not None:
        exact = min(exact, _positive(facts, "original_max_position_embeddings"))
    if exact >= context:
        return context
    logger.warning(
        "config.json has %s: beyond %d tokens it is another attention, which is not built here. The model is served "
        "as one of %d tokens, within which its attention is plain attention, and not of %d",
        _KEY,
        exact,
        exact,
        context,
    )
    return exact


def _positive(facts: Mapping[str, Any], key: str) -> int:
    try:
        value = count(facts, key)
    except CheckpointError as error:
        raise CheckpointError(f"{_KEY}.{error}") from None
    if value < 1:
        raise CheckpointError(f"{_KEY}.{key} is {value}; accepted: whole numbers from 1")
    return value
