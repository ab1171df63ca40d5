"""How much an error in each column of a matrix matters, by what its inputs were."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_aot.exporter.calibration.moments import Moment

# So many tokens' worth of all columns mattering alike: an expert that few tokens chose saw a few of its columns at
# work, and the others aren't worth nothing.
_PRIOR_TOKENS = 16


def importance_of(moment: Moment | None, width: int) -> Tensor:
    """[K]: the inputs' mean squares, drawn towards their average where there were few tokens.

    Args:
        moment: of the inputs; None: none were seen.
        width: K.
    """
    if moment is None:
        return torch.ones(width)
    squares = moment.mean().diagonal()
    kept = moment.tokens / (moment.tokens + _PRIOR_TOKENS)
    return squares * kept + squares.mean() * (1 - kept)
