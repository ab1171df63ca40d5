"""Rounds all matrices of one layer by an algorithm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from qwen_aot.exporter.calibration.decoder_layer import Place, Reading, Weights
from qwen_aot.exporter.calibration.moments import Moment
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, EncodedRows
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.rounding.algorithms import Algorithm
from qwen_aot.exporter.rounding.compensated import compensation_for
from qwen_aot.exporter.rounding.grid import fit_grid
from qwen_aot.exporter.rounding.importance import importance_of
from qwen_aot.exporter.rounding.inputs import fitted_scale, input_error
from qwen_aot.exporter.rounding.scaling import scale_site, sites

_ERROR_ROWS = 1024  # of a matrix, evenly spread, by which its error is reported


class UnstorableError(Exception):
    """A matrix has a group, or an input, whose scale float16 doesn't hold."""

    def __init__(self, place: Place) -> None:
        super().__init__(f"the scales of {place} are too large for float16")
        self.place = place


@dataclass(slots=True)
class RoundedLayer:
    """What became of a layer.

    Attributes:
        encoded: the rounded matrices.
        weights: all tensors, the rounded ones as the floats that their codes stand for.
        errors: of each matrix, the mean squared difference of its outputs over their mean square; of large ones, of
            some rows.
        input_scales: of the inputs that are rounded too.
    """

    encoded: dict[Place, EncodedRows]
    weights: Weights
    errors: dict[Place, float]
    input_scales: dict[Reading, float]


def round_layer(
    config: ModelConfig,
    weights: Weights,
    found: Sequence[Reading],
    moments: dict[Reading, Moment],
    forms: Mapping[Place, CodeForm],
    algorithm: Algorithm,
    stored: Callable[[Tensor], Tensor],
) -> RoundedLayer:
    """Rounds one layer.

    Args:
        config: the model's facts.
        weights: of the layer in float32; taken over.
        found: its readings.
        moments: of what these read; taken over, and emptied. Empty for an algorithm that needs none; where one is
            missing (of an expert that no token chose) all columns matter alike.
        forms: of the codes of each matrix; those that are missing stay plain.
        algorithm: how.
        stored: rounds plain weights to the type in which they are saved.

    Raises:
        UnstorableError: float16 doesn't hold a scale.
    """
    if algorithm.scales:
        for site in sites(config, found):
            scale_site(site, weights, moments, forms, stored)
    result = RoundedLayer({}, weights, {}, {})
    for reading in found:
        moment = moments.pop(reading, None)
        if reading.places[0] not in forms:
            continue
        scale = None
        if forms[reading.places[0]].has_input_scale:
            assert moment is not None and moment.sample is not None, "an input that all tokens reach"
            matrices = [weights[place] for place in reading.places]
            scale = result.input_scales[reading] = fitted_scale(
                moment.largest, moment.sample, matrices, forms[reading.places[0]].code_type
            )
            if not math.isfinite(scale):
                raise UnstorableError(reading.places[0])
        compensation = compensation_for(moment) if algorithm.compensates else None
        importance = importance_of(moment, weights[reading.places[0]].shape[1])
        for place in reading.places:
            matrix = weights[place]
            grid = fit_grid(matrix, importance, forms[place])
            if not grid.is_finite:
                raise UnstorableError(place)
            codes = grid.nearest(matrix) if compensation is None else compensation.codes(matrix, grid)
            values = weights[place] = grid.values(codes)
            result.encoded[place] = dataclasses.replace(grid.encoded(codes), input_scale=scale)
            result.errors[place] = _relative_error(values, matrix, moment, scale, forms[place].code_type)
    return result


def _relative_error(
    values: Tensor, matrix: Tensor, moment: Moment | None, scale: float | None, code_type: CodeType
) -> float:
    step = -(-len(matrix) // _ERROR_ROWS)
    matrix = matrix[::step]
    difference = values[::step] - matrix
    if moment is None:
        return float(difference.square().sum() / matrix.square().sum().clamp_min(1e-30))
    mean = moment.mean()
    lost = float(((difference @ mean) * difference).sum())
    if scale is not None and moment.sample is not None:
        lost += input_error(moment.sample, matrix, scale, code_type)
    return lost / max(float(((matrix @ mean) * matrix).sum()), 1e-30)
