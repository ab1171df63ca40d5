"""GPTQ: columns are rounded one after the other, and each one's error is made up for by those still to come.

Source: Frantar et al., "GPTQ" (arXiv:2210.17323), and its published code; groups are fitted before the first column is
rounded ("static groups"), so that columns can be taken in the order of their inputs' size ("act-order") and still stay
where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_aot.exporter.rounding.grid import Grid

DAMPING = 0.01  # of the moment's mean diagonal, added to it: GPTQ's own default
_BLOCK = 64  # columns whose errors are spread among themselves before they are spread over the rest


class Compensation:
    """How errors spread, for all matrices [N, K] that read one input.

    Args:
        moment: [K, K] float32, the mean of x xᵀ over inputs x.
        damping: of the moment's mean diagonal, added to its diagonal.

    Raises:
        torch.linalg.LinAlgError: the moment isn't one (NaN among the inputs).
    """

    def __init__(self, moment: Tensor, damping: float = DAMPING) -> None:
        self._order = torch.argsort(moment.diagonal(), descending=True, stable=True)
        damped = moment[self._order][:, self._order]
        diagonal = damped.diagonal()
        diagonal.add_(damping * diagonal.mean() if diagonal.any() else 1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        self._factor = torch.linalg.cholesky(inverse, upper=True)  # [K, K], columns in their order of rounding

    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """Codes [N, K] float32 of a matrix, such that its products with the inputs change little.

        Args:
            weight: [N, K] float32.
            grid: what its codes stand for.
        """
        order, factor = self._order, self._factor
        rest = weight.t()[order].contiguous()  # [K, N]: a column of the matrix is a row here
        scales, zeros = grid.scales.t().contiguous(), grid.zeros.t().contiguous()
        inverse = torch.where(scales == 0, torch.zeros(()), 1 / scales)
        codes = torch.empty_like(rest)
        groups = (order // grid.form.group_size).tolist()
        for start in range(0, len(rest), _BLOCK):
            stop = min(start + _BLOCK, len(rest))
            errors = torch.empty(stop - start, rest.shape[1])
            for column in range(start, stop):
                group, exact = groups[column], rest[column]
                found = torch.round(exact * inverse[group]).add_(zeros[group]).clamp_(0, grid.top)
                codes[column] = found
                error = (exact - (found - zeros[group]).mul_(scales[group])).div_(factor[column, column])
                errors[column - start] = error
                if column + 1 < stop:
                    rest[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            if stop < len(rest):
                rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        result = torch.empty_like(codes)
        result[order] = codes
        return result.t().contiguous()
