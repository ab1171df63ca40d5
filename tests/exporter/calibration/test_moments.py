"""Second moments against NumPy's, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_aot.exporter.calibration.decoder_layer import Reading
from qwen_aot.exporter.calibration.moments import Moment, Moments
from qwen_aot.exporter.model.tensors import Role

INPUTS = np.random.default_rng(0).normal(0.3, 2.0, (57, 12)).astype(np.float32)
TOLERANCE = 1e-5  # relative, of sums of 57 products in float32


def moment_of(*parts: np.ndarray) -> Moment:
    moment = Moment.empty(12)
    for part in parts:
        moment.add(torch.from_numpy(part))
    return moment


@pytest.mark.parametrize("cuts", [[], [1], [20, 40], list(range(1, 57))], ids=len)
def test_means_are_numpys_whatever_the_parts(cuts: list[int]) -> None:
    moment = moment_of(*np.split(INPUTS, cuts))
    exact = INPUTS.astype(np.float64)
    assert moment.tokens == 57
    np.testing.assert_allclose(moment.mean().numpy(), exact.T @ exact / 57, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(moment.magnitudes.numpy(), np.abs(exact).mean(0), rtol=TOLERANCE)


def test_nothing_was_seen() -> None:
    moment = Moment.empty(3)
    assert moment.tokens == 0
    assert not moment.mean().any()
    assert moment.is_finite


def test_scaled_is_what_scaled_inputs_give() -> None:
    scale = np.linspace(0.25, 4, 12).astype(np.float32)
    found, expected = moment_of(INPUTS), moment_of(INPUTS / scale)
    found.scaled(torch.from_numpy(scale))
    np.testing.assert_allclose(found.mean().numpy(), expected.mean().numpy(), rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(found.magnitudes.numpy(), expected.magnitudes.numpy(), rtol=TOLERANCE)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e25])  # the last: its square is more than float32 holds
def test_what_isnt_finite_is_seen(wrong: float) -> None:
    inputs = INPUTS.copy()
    inputs[31, 4] = wrong
    assert not moment_of(inputs).is_finite
    assert moment_of(INPUTS).is_finite


def test_each_input_has_its_own() -> None:
    one, other = Reading(((Role.GATE, None), (Role.UP, None))), Reading(((Role.DOWN, None),))
    moments = Moments()
    moments.observe(one, torch.ones(2, 3))
    moments.observe(other, torch.zeros(5, 4))
    moments.observe(Reading(one.places), torch.ones(1, 3))
    assert {reading: moment.tokens for reading, moment in moments.of.items()} == {one: 3, other: 5}
