"""Chooses each matrix's bits and groups by what it loses, within a size that all have together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from qwen_aot.engines.spec.quantize_spec import QuantizeSpec, bits_of, rounded_tensors
from qwen_aot.errors import BuildError
from qwen_aot.exporter.calibration.decoder_layer import Place
from qwen_aot.exporter.calibration.hidden_states import HiddenStates
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.model.tensors import Tensor, WeightClass
from qwen_aot.exporter.rounding.budget import Option, choose
from qwen_aot.exporter.rounding.sensitivity import measure

CANDIDATES = ((4, 128), (4, 64), (4, 32), (8, 128), (8, 32))  # bits and groups
Unit = tuple[int, str]  # what has one kind of codes: matrices of a layer that read one input, or all its experts


def mixed_forms(
    checkpoint: Checkpoint, spec: QuantizeSpec, hidden: HiddenStates, advance: Callable[[int, int], None]
) -> dict[str, CodeForm]:
    """The codes of every matrix inside the layers.

    Args:
        checkpoint: opened.
        spec: with `bits_per_weight`.
        hidden: with the float streams in front of layer 0.
        advance: told the layers done and in all.

    Raises:
        BuildError: no codes are that small, or no group divides the rows of a matrix.
    """
    assert spec.bits_per_weight is not None
    tensors = rounded_tensors(checkpoint.config)
    by_place = {(tensor.layer, tensor.role, tensor.expert): tensor for tensor in tensors}

    def forms(place: Place, layer: int) -> list[CodeForm]:
        key = (layer, *place)
        return [spec.form_of(by_place[key], bits, size) for bits, size in CANDIDATES]

    losses: dict[Unit, list[float]] = defaultdict(lambda: [0.0] * len(CANDIDATES))
    units: dict[str, Unit] = {}
    for found in measure(checkpoint, hidden, forms, spec.sequence_length, advance):
        role, expert = found.reading.places[0]
        unit = (found.layer, found.reading.name if expert is None else role.weight_class.value)
        losses[unit] = [old + new for old, new in zip(losses[unit], found.losses, strict=True)]
        for role, expert in found.reading.places:
            units[role.tensor_name(found.layer, expert)] = unit
    sizes: dict[Unit, list[float]] = defaultdict(lambda: [0.0] * len(CANDIDATES))
    for tensor in tensors:
        if tensor.name not in units:
            units[tensor.name] = _of_experts(tensor)
        unit = units[tensor.name]
        for index, form in enumerate(forms((tensor.role, tensor.expert), tensor.layer or 0)):
            sizes[unit][index] += bits_of(form, tensor.shape)
    options = {
        unit: [Option(size, loss) for size, loss in zip(sizes[unit], losses[unit], strict=True)] for unit in sizes
    }
    allowed = spec.bits_per_weight * sum(math.prod(tensor.shape) for tensor in tensors)
    try:
        chosen = choose(options, allowed)
    except ValueError:
        least = sum(min(option.size for option in each) for each in options.values())
        raise BuildError(
            f"bits_per_weight is {spec.bits_per_weight}, and the smallest codes of this model take "
            f"{math.ceil(least * spec.bits_per_weight / allowed * 1000) / 1000}; accepted: that or more"
        ) from None
    return {
        tensor.name: forms((tensor.role, tensor.expert), tensor.layer or 0)[chosen[units[tensor.name]]]
        for tensor in tensors
    }


def _of_experts(tensor: Tensor) -> Unit:
    """Of an expert that no token reached."""
    assert tensor.layer is not None
    assert tensor.role.weight_class is WeightClass.EXPERT
    return tensor.layer, WeightClass.EXPERT.value
