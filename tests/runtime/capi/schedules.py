"""Plans of tests/runtime/generation/schedules.py for the C++ batch: the same requests, and what it did at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.runtime.generation.schedules import MAX_CONTEXT, Fault, Planned
from tests.runtime.toys import VOCAB_SIZE


def described(
    plan: Sequence[Planned],
    *,
    rows: int,
    prefill_chunk: int = 512,
    faults: Sequence[Fault] = (),
    poison: frozenset[int] = frozenset(),
    settings: Sequence[Mapping[str, Any]] = (),
    rotary_length: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A plan as src/generation.cpp reads it; `settings` are further ones of each request."""
    return {
        "what": "schedule",
        "vocabulary": VOCAB_SIZE,
        "rows": rows,
        "max_context": MAX_CONTEXT,
        "prefill_chunk": prefill_chunk,
        "rotary_length": rotary_length or -1,
        "poison": sorted(poison),
        "faults": [{"call": each.call, "number": each.number, "rows": each.rows} for each in faults],
        "requests": [
            {
                "prompt": each.prompt,
                "arrives": each.arrives,
                "cancelled": each.cancelled,
                "keep_cache": each.keep_cache,
                "cache_scope": each.cache_scope,
                "settings": {
                    "max_new_tokens": each.max_new_tokens,
                    "n": each.n,
                    "prompt_logprobs": each.prompt_logprobs,
                    **(settings[number] if settings else {}),
                },
            }
            for number, each in enumerate(plan)
        ],
        **more,
    }
