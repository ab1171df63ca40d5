"""Chooses which matrices stay plain where inputs are rounded too: those that would lose most, within a share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from qwen_aot.engines.spec.quantize_spec import QuantizeSpec
from qwen_aot.exporter.calibration.decoder_layer import Place
from qwen_aot.exporter.calibration.hidden_states import HiddenStates
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.rounding.sensitivity import Sensitivity, measure

# What all rounded inputs and matrices together may change of the stream, as its square over its usual one: where they
# change less, nothing more stays plain. What each changes is of the size of a float16's rounding then.
ENOUGH = 1e-3


def forms_but_plain(
    checkpoint: Checkpoint, spec: QuantizeSpec, hidden: HiddenStates, advance: Callable[[int, int], None]
) -> dict[str, CodeForm]:
    """The codes of every matrix inside the layers that is rounded.

    Args:
        checkpoint: opened.
        spec: with `plain_share`.
        hidden: with the float streams in front of layer 0.
        advance: told the layers done and in all.

    Raises:
        BuildError: what some matrices read isn't finite.
    """
    assert spec.plain_share is not None
    forms = spec.forms(checkpoint.config)

    def ways(place: Place, layer: int) -> Sequence[CodeForm]:
        role, expert = place
        form = forms.get(role.tensor_name(layer, expert))
        return () if form is None else (form,)

    losses = list(measure(checkpoint, hidden, ways, spec.sequence_length, advance, scales=spec.how.scales))
    weights = {each: _weights(checkpoint, each) for each in losses}
    left = spec.plain_share * sum(weights.values())
    lost = math.fsum(each.losses[0] for each in losses)
    for each in sorted(losses, key=lambda each: -each.losses[0]):
        if lost <= ENOUGH:
            break
        if weights[each] > left:
            continue
        left -= weights[each]
        lost -= each.losses[0]
        for name in _names(each):
            del forms[name]
    return forms


def _names(each: Sensitivity) -> list[str]:
    return [role.tensor_name(each.layer, expert) for role, expert in each.reading.places]


def _weights(checkpoint: Checkpoint, each: Sensitivity) -> int:
    return sum(math.prod(checkpoint.tensors[name].shape) for name in _names(each))
