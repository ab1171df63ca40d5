"""GPTQ: columns are rounded one after the other, and each one's error is made up for by those still to come.

Source: Frantar et al., "GPTQ" (arXiv:2210.17323), and its published code; groups are fitted before the first column is
rounded ("static groups"), so that columns can be taken in the order of their inputs' size ("act-order") and still stay
where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_aot.exporter.calibration.moments import Moment
from qwen_aot.exporter.rounding.grid import Grid, nearest_codes

DAMPING = 0.01  # of the moment's mean diagonal, added to it: GPTQ's own default
# Of moments with fewer tokens than this share of their width, an inverse says more of the texts than of the model.
_LEAST_TOKENS = 0.5
_BLOCK = 64  # columns whose errors are spread among themselves before they are spread over the rest
_MOVED_ROWS = 1024  # of a moment, put into another order together


class Compensation:
    """How errors spread, for all matrices [N, K] that read one input.

    Beside the moment there are at most three more of its size: 2.4 GB each where K is 24576.

    Args:
        moment: [K, K] float32, the mean of x xᵀ over inputs x; kept as it is.
        damping: of the moment's mean diagonal, added to its diagonal; ten times as much, and so on, while the sum has
            no Cholesky factor (float32 holds the moment of nearly dependent inputs no better).

    Raises:
        ValueError: the moment isn't one (NaN or infinities among the inputs).
    """

    def __init__(self, moment: Tensor, damping: float = DAMPING) -> None:
        self._order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        lower = _damped_factor(moment, self._order.flip(0), damping)
        # GPTQ's factor U, upper, with UᵀU the inverse of the damped moment D. Turned round both ways, D is L Lᵀ, and
        # U is the inverse of L, turned round.
        inverse = torch.eye(len(lower))
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower
        self._factor = _turned(inverse)  # [K, K], columns in their order of rounding

    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """Codes [N, K] float32 of a matrix, such that its products with the inputs change little.

        Args:
            weight: [N, K] float32.
            grid: what its codes stand for.
        """
        factor = self._factor
        rest = weight.t().index_select(0, self._order)  # [K, N]: a column is a row here; becomes codes, row by row
        scales, zeros, inverse = (part.t().contiguous() for part in (grid.scales, grid.zeros, grid.inverse))
        groups = (self._order // grid.form.group_size).tolist()
        errors = torch.empty(_BLOCK, rest.shape[1])
        for start in range(0, len(rest), _BLOCK):
            stop = min(start + _BLOCK, len(rest))
            for column in range(start, stop):
                group, exact = groups[column], rest[column]
                found = nearest_codes(exact * inverse[group], zeros[group], grid.form)
                error = errors[column - start]
                torch.sub(exact, (found - zeros[group]).mul_(scales[group]), out=error)
                error /= factor[column, column]
                exact.copy_(found)
                if column + 1 < stop:
                    rest[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            if stop < len(rest):
                rest[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
        return rest.t().index_select(1, torch.argsort(self._order))


def compensation_for(moment: Moment | None) -> Compensation | None:
    """By a moment of enough tokens; None: there are too few, and columns are better rounded each for itself."""
    if moment is None or moment.tokens < _LEAST_TOKENS * len(moment.products):
        return None
    return Compensation(moment.mean())


def _damped_factor(moment: Tensor, order: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of a moment whose rows and columns stand in another order."""
    mean = moment.diagonal().mean()
    if not mean.isfinite():
        raise ValueError("the moment holds something that isn't a finite number")
    share, whole = damping, float(mean) or 1.0
    while True:
        damped = torch.empty_like(moment)
        for start in range(0, len(order), _MOVED_ROWS):
            damped[start : start + _MOVED_ROWS] = moment[order[start : start + _MOVED_ROWS]].index_select(1, order)
        damped.diagonal().add_(share * whole)
        found: Tensor
        found, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return found
        if share > len(order):  # more than any eigenvalue
            raise ValueError("the moment holds something that isn't a finite number")
        share = max(share, 1e-4) * 10


def _turned(square: Tensor) -> Tensor:
    """A matrix with its rows and its columns in the opposite order, in place."""
    flat = square.view(-1)
    for start in range(0, len(flat) // 2, _MOVED_ROWS * len(square)):
        stop = min(start + _MOVED_ROWS * len(square), len(flat) // 2)
        front, back = flat[start:stop], flat[len(flat) - stop : len(flat) - start]
        kept = front.clone()
        front.copy_(back.flip(0))
        back.copy_(kept.flip(0))
    return square
