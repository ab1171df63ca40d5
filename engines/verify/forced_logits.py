"""Logits of given texts from an engine that tells those of a step's last token only, on all of its rows at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen_aot.engines.verify.scores import ScoredEngine


def forced_logits(
    engine: ScoredEngine,
    rows: int,
    sequences: Sequence[NDArray[np.int64]],
    prompts: Sequence[int],
    lengths: Sequence[int],
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Prefills each sequence's prompt and feeds the rest a token a step, `rows` sequences side by side.

    Longest rests go first, so that rows which stand side by side end at nearly the same step.

    Args:
        engine: its rows 0 to `rows` - 1 are emptied, before and after.
        rows: that it has, at least 1.
        sequences: token ids [T] each.
        prompts: tokens of each prompt, 1 to T.
        lengths: tokens of the prompt that each is to be computed as (`Engine.prefill`), at least those.

    Yields:
        Sequence, position (from its prompt's last token to its last) and logits [V], which are valid until the next.
    """
    rests = [len(sequence) - prompt for sequence, prompt in zip(sequences, prompts, strict=True)]
    order = sorted(range(len(sequences)), key=lambda index: (-rests[index], index))
    for start in range(0, len(order), rows):
        together = order[start : start + rows]
        for row, index in enumerate(together):
            engine.truncate(row, 0)
            logits = engine.prefill(row, sequences[index][: prompts[index]], lengths[index])
            yield index, prompts[index] - 1, logits
        for step in range(rests[together[0]]):
            running = [index for index in together if step < rests[index]]
            fed = np.array([sequences[index][prompts[index] + step] for index in running], np.int64)
            for index, logits in zip(running, engine.decode(0, fed), strict=True):
                yield index, prompts[index] + step, logits
        for row in range(len(together)):
            engine.truncate(row, 0)
