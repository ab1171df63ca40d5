"""Rounds all matrices of one layer by an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_aot.exporter.calibration.decoder_layer import Place, Reading, Weights
from qwen_aot.exporter.calibration.moments import Moment
from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.rounding.algorithms import Algorithm
from qwen_aot.exporter.rounding.compensated import Compensation
from qwen_aot.exporter.rounding.grid import fit_grid
from qwen_aot.exporter.rounding.scaling import scale_site, sites

# Of moments with fewer tokens than this share of their width, an inverse says more of the texts than of the model.
_LEAST_TOKENS = 0.5


@dataclass(slots=True)
class RoundedLayer:
    """What became of a layer.

    Attributes:
        encoded: the rounded matrices.
        weights: all tensors, the rounded ones as the floats that their codes stand for.
        errors: of each matrix, the mean squared difference of its outputs over their mean square.
    """

    encoded: dict[Place, EncodedRows]
    weights: Weights
    errors: dict[Place, float]


def round_layer(
    config: ModelConfig,
    weights: Weights,
    found: Sequence[Reading],
    moments: Mapping[Reading, Moment],
    forms: Mapping[Place, CodeForm],
    algorithm: Algorithm,
    stored: Callable[[Tensor], Tensor],
) -> RoundedLayer:
    """Rounds one layer.

    Args:
        config: the model's facts.
        weights: of the layer in float32; taken over.
        found: its readings.
        moments: of what these read; empty for an algorithm that needs none. One that no token reached (an expert that
            none chose) counts as if all columns mattered alike.
        forms: of the codes of each matrix.
        algorithm: how.
        stored: rounds plain weights to the type in which they are saved.
    """
    if algorithm.scales:
        for site in sites(config, found):
            scale_site(site, weights, moments, forms, stored)
    result = RoundedLayer({}, weights, {})
    for reading in found:
        moment = moments.get(reading)
        mean = None if moment is None else moment.mean()
        width = weights[reading.places[0]].shape[1]
        compensation = None
        if algorithm.compensates and moment is not None and moment.tokens >= _LEAST_TOKENS * width:
            compensation = Compensation(moment.mean())
        importance = torch.ones(width) if mean is None else mean.diagonal()
        for place in reading.places:
            matrix = weights[place]
            grid = fit_grid(matrix, importance, forms[place])
            codes = grid.nearest(matrix) if compensation is None else compensation.codes(matrix, grid)
            values = grid.values(codes)
            result.encoded[place] = grid.encoded(codes)
            result.errors[place] = _relative_error(values - matrix, matrix, mean)
            weights[place] = values
    return result


def _relative_error(difference: Tensor, matrix: Tensor, mean: Tensor | None) -> float:
    if mean is None:
        return float(difference.square().sum() / matrix.square().sum().clamp_min(1e-30))
    return float(((difference @ mean) * difference).sum() / ((matrix @ mean) * matrix).sum().clamp_min(1e-30))
