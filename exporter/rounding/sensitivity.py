"""How much of the residual stream each input's matrices would change, were they rounded in one way or another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_aot.exporter.calibration.decoder_layer import DecoderLayer, Place, Reading, Weights, load_weights, readings
from qwen_aot.exporter.calibration.hidden_states import HiddenStates
from qwen_aot.exporter.calibration.moments import Moment, Moments
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.model.tensors import Role
from qwen_aot.exporter.rounding.grid import FACTORS, fit_grid
from qwen_aot.exporter.rounding.inputs import input_scale, noise
from qwen_aot.exporter.rounding.scaling import scale_site, sites

# Of a matrix of a layer: the ways in which it may be rounded; none: it stays plain.
FormsOf = Callable[[Place, int], Sequence[CodeForm]]

_OUTPUTS = {  # what reads an input -> what its answers go through before they reach the stream
    Role.QUERY: Role.OUTPUT,
    Role.OUTPUT: Role.OUTPUT,
    Role.GATE: Role.DOWN,
    Role.DOWN: Role.DOWN,
    Role.EXPERT_GATE: Role.EXPERT_DOWN,
    Role.EXPERT_DOWN: Role.EXPERT_DOWN,
    Role.SHARED_GATE: Role.SHARED_DOWN,
    Role.SHARED_DOWN: Role.SHARED_DOWN,
}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of the matrices of one layer that read one input.

    Attributes:
        layer: theirs.
        reading: theirs.
        losses: for each way of rounding them, the squared change of the stream over its usual square.
    """

    layer: int
    reading: Reading
    losses: tuple[float, ...]


def measure(
    checkpoint: Checkpoint,
    hidden: HiddenStates,
    forms: FormsOf,
    length: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    scales: bool = False,
) -> Iterator[Sensitivity]:
    """Goes through the float model a layer at a time.

    A layer's own change of the stream is known only behind its last projection. What is rounded before that counts by
    the share of its answers that is wrong, times what comes of them.

    Args:
        checkpoint: opened.
        hidden: with the streams in front of layer 0; those of later layers are written and deleted.
        forms: the ways, the same number for all matrices that read one input.
        length: positions of a stream.
        advance: told the layers done and in all.
        scales: inputs are scaled before (`exporter.rounding.scaling`), for each matrix's first way.
    """
    config = checkpoint.config
    compute = DecoderLayer(config, length)
    for layer in range(config.num_hidden_layers):
        weights = load_weights(checkpoint, layer)
        moments = Moments()
        hidden.advance(layer, lambda part, w=weights, m=moments: compute(w, part, m.observe))  # type: ignore[misc]
        hidden.forget(layer)
        usual = _usual_square(hidden, layer + 1)
        every = list(readings(config, is_sparse=config.is_sparse(layer)))
        tokens = max(moment.tokens for moment in moments.of.values())
        if scales:
            ways = {place: forms(place, layer) for reading in every for place in reading.places}
            first = {place: way[0] for place, way in ways.items() if way}
            for site in sites(config, every):
                scale_site(site, weights, moments.of, first, lambda weight: weight)
        for reading in every:
            if reading not in moments.of or not forms(reading.places[0], layer):
                continue
            yield Sensitivity(layer, reading, tuple(_losses(reading, layer, weights, moments.of, forms, usual, tokens)))
        advance(layer + 1, config.num_hidden_layers)
    hidden.forget(config.num_hidden_layers)


def _losses(
    reading: Reading,
    layer: int,
    weights: Weights,
    moments: Mapping[Reading, Moment],
    forms: FormsOf,
    usual: float,
    tokens: int,
) -> Iterator[float]:
    moment = moments[reading]
    mean = moment.mean()
    role, expert = reading.places[0]
    last = Reading(((_OUTPUTS[role], expert),))
    reached = _energy(weights[last.places[0]], moments[last].mean()) * moments[last].tokens / tokens
    answers = sum(_energy(weights[place], mean) for place in reading.places)
    ways = [forms(place, layer) for place in reading.places]
    for way in zip(*ways, strict=True):
        wrong = sum(_rounding(weights[place], moment, form) for place, form in zip(reading.places, way, strict=True))
        yield wrong / max(answers, 1e-30) * reached / usual


def _rounding(matrix: Tensor, moment: Moment, form: CodeForm) -> float:
    """The mean squared change of a matrix's answers when it, and perhaps its input, is rounded to nearest."""
    mean = moment.mean()
    grid = fit_grid(matrix, mean.diagonal(), form, (1.0,) if form.has_input_scale else FACTORS)
    lost = _energy(grid.values(grid.nearest(matrix)) - matrix, mean)
    if not form.has_input_scale:
        return lost
    return lost + noise(matrix, input_scale(moment.largest, form.code_type), mean.diagonal(), form.code_type)


def _energy(matrix: Tensor, mean: Tensor) -> float:
    """The mean square of a matrix's answers, summed over its rows."""
    return float(((matrix @ mean) * matrix).sum())


def _usual_square(hidden: HiddenStates, layer: int) -> float:
    """The median over tokens of the stream's square: a few tokens have streams a thousand times as large."""
    squares = [hidden.read(layer, part).square().sum(-1).flatten() for part in hidden.batches()]
    return float(torch.cat(squares).median().clamp_min(1e-30))
