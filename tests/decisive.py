"""A tiny model that is sure of its next tokens, without training: random layers under a head that is fitted to a text.

Random weights are sure of nothing, so that scores on them show little. Here every layer shapes the hidden states, and
the head, the solution of one linear system in fp64, reads each next token of the text from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.checkpoints import quiet, tiny_config, tiny_model

VOCAB, TOKENS = 131, 256
CERTAINTY = 40.0  # logits of the right token over the others, about a third of which survives the ridge
RIDGE = 10.0  # keeps the head's weights small, so that rounding them doesn't undo the fit


def decisive_text(seed: int = 0) -> NDArray[np.int64]:
    """A text; that of seed 0 is the one that `verify` draws for a bundle without a tokenizer."""
    return np.random.default_rng(seed).integers(0, VOCAB, TOKENS)


def save_decisive(path: Path, *, seed: int = 0, **overrides: Any) -> None:
    """Saves a two-layer model of 128 channels, random but for its head, which knows `decisive_text(seed)` by heart."""
    shape = {"hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 256, "vocab": VOCAB} | overrides
    model = tiny_model(tiny_config(**shape), seed=seed)
    text = torch.from_numpy(decisive_text(seed))
    with torch.no_grad():
        hidden = model.model(text[None])[0][0, :-1].double()
        wanted = torch.nn.functional.one_hot(text[1:], VOCAB).double() - 1 / VOCAB
        gram = hidden.T @ hidden + RIDGE * torch.eye(hidden.shape[1], dtype=torch.float64)
        model.lm_head.weight.copy_(CERTAINTY * torch.linalg.solve(gram, hidden.T @ wanted).T.float())
    with quiet():
        model.save_pretrained(path)
