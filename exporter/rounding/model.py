"""Rounds a whole model, one layer in memory at a time, each calibrated on what the rounded layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from qwen_aot.exporter.calibration.decoder_layer import (
    DecoderLayer,
    Place,
    Reading,
    RoundInput,
    load_weights,
    readings,
)
from qwen_aot.exporter.calibration.hidden_states import HiddenStates
from qwen_aot.exporter.calibration.moments import Moments
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows
from qwen_aot.exporter.rounding.algorithms import Algorithm
from qwen_aot.exporter.rounding.inputs import rounded_input
from qwen_aot.exporter.rounding.layer import RoundedLayer, UnstorableError, round_layer
from qwen_aot.exporter.rounding.refusals import no_scale, require_numbers

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SavedLayer:
    """A layer as a checkpoint has it, by tensors' names.

    Attributes:
        encoded: the rounded matrices.
        plain: everything else, float32: what a scaling changed is other than in the source.
        errors: of each rounded matrix, relative, of its outputs.
    """

    encoded: Mapping[str, EncodedRows]
    plain: Mapping[str, NDArray[Any]]
    errors: Mapping[str, float]


class LayerRounder:
    """Rounds a model's layers in order.

    Args:
        checkpoint: opened; read a layer at a time.
        hidden: with the streams in front of each layer that is rounded; None for an algorithm without texts.
        forms: of the codes of every matrix that is rounded, by its tensor's name.
        algorithm: how.
        stored: rounds plain weights to the type in which they are saved.
        length: positions of every sequence in `hidden`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hidden: HiddenStates | None,
        forms: Mapping[str, CodeForm],
        algorithm: Algorithm,
        stored: Callable[[Tensor], Tensor],
        length: int,
    ) -> None:
        self._checkpoint, self._hidden, self._forms = checkpoint, hidden, forms
        self._algorithm, self._stored = algorithm, stored
        self._compute = DecoderLayer(checkpoint.config, length)

    def round(self, layer: int) -> SavedLayer:
        """Rounds one layer, and writes the streams behind it.

        Raises:
            BuildError: weights, or what projections read, hold NaN, infinities, or numbers too large to be rounded.
            CheckpointError: a tensor can't be read.
        """
        config = self._checkpoint.config
        weights = load_weights(self._checkpoint, layer)
        found = list(readings(config, is_sparse=config.is_sparse(layer)))
        named = {place: _name(place, layer) for reading in found for place in reading.places}
        forms = {place: self._forms[name] for place, name in named.items() if name in self._forms}
        moments = Moments([reading for reading in found if _rounds_input(forms.get(reading.places[0]))])
        if self._hidden is not None:
            for part in self._hidden.batches():
                self._compute(weights, self._hidden.read(layer, part), moments.observe)
        for reading, moment in moments.of.items():
            require_numbers(moment, _name(reading.places[0], layer))
        try:
            rounded = round_layer(config, weights, found, moments.of, forms, self._algorithm, self._stored)
        except UnstorableError as error:
            raise no_scale(_name(error.place, layer)) from None
        self._save_stored(rounded)
        if self._hidden is not None:
            self._hidden.advance(
                layer, lambda part: self._compute(rounded.weights, part, round_input=_rounding(rounded))
            )
        return _by_name(rounded, layer)

    def _save_stored(self, rounded: RoundedLayer) -> None:
        """Plain weights become what is saved, so that the next layer is calibrated behind it."""
        for place, weight in rounded.weights.items():
            if place not in rounded.encoded:
                rounded.weights[place] = self._stored(weight)


def _rounds_input(form: CodeForm | None) -> bool:
    return form is not None and form.has_input_scale


def _rounding(rounded: RoundedLayer) -> RoundInput:
    """What is done to a layer's inputs before its matrices read them."""

    def round_input(reading: Reading, x: Tensor) -> Tensor:
        scale = rounded.input_scales.get(reading)
        if scale is None:
            return x
        return rounded_input(x, scale, rounded.encoded[reading.places[0]].form.code_type)

    return round_input


def _by_name(rounded: RoundedLayer, layer: int) -> SavedLayer:
    return SavedLayer(
        {_name(place, layer): rows for place, rows in rounded.encoded.items()},
        {_name(place, layer): w.numpy() for place, w in rounded.weights.items() if place not in rounded.encoded},
        {_name(place, layer): error for place, error in rounded.errors.items()},
    )


def _name(place: Place, layer: int) -> str:
    role, expert = place
    return role.tensor_name(layer, expert)
