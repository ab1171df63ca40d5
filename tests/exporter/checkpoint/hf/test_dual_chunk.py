"""Dual chunk attention, written again from its formulas, against plain attention: where they are the same."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.hf.dual_chunk import exact_context

CHUNK, LOCAL, LONGEST = 24, 8, 64
D = 8


def rotated(x: NDArray[np.float64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """RoPE, rotate-half, x [T, D] at positions [T]."""
    angles = positions[:, None] / 50.0 ** (np.arange(D // 2) / (D // 2))
    low, high = np.split(x, 2, axis=1)
    return np.concatenate(
        (low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)), 1
    )


def dual_chunk_scores(query: NDArray[np.float64], key: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores [T, T] of arXiv 2402.17463: keys have their place in their chunk, queries one for each chunk they see.

    In its own chunk: its position there. In the one before: that plus a chunk, at most CHUNK. Further back: the largest
    of these. Chunks are of CHUNK - LOCAL tokens.
    """
    length = CHUNK - LOCAL
    places = np.arange(len(query))
    keys = rotated(key, places % length)
    within = places % length
    own = rotated(query, within) @ keys.T
    next_ = rotated(query, np.minimum(within + length, CHUNK)) @ keys.T
    far = rotated(query, np.full_like(places, CHUNK)) @ keys.T
    distance = places[:, None] // length - places[None, :] // length  # in chunks
    return np.where(distance == 0, own, np.where(distance == 1, next_, far))


@pytest.mark.parametrize("tokens", [CHUNK - LOCAL, CHUNK, CHUNK + 2])
def test_it_is_plain_attention_up_to_a_chunk_and_not_beyond(tokens: int) -> None:
    random = np.random.default_rng(0)
    query, key = random.standard_normal((2, tokens, D))
    plain = rotated(query, np.arange(tokens)) @ rotated(key, np.arange(tokens)).T
    is_seen = np.tril(np.ones((tokens, tokens), bool))
    difference = np.abs(dual_chunk_scores(query, key) - plain)[is_seen].max()
    exact = exact_context({"dual_chunk_attention_config": {"chunk_size": CHUNK, "local_size": LOCAL}}, LONGEST)
    assert exact == CHUNK
    assert difference < 1e-9 if tokens <= exact else difference > 0.1
