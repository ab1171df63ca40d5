"""Rounded inputs, against ONNX's own definition of QuantizeLinear and DequantizeLinear, and by counting."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from qwen_aot.exporter.rounding.inputs import fitted_scale, input_error, input_scale, noise, rounded_input

MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["": 21]> g (float[n] x, float s) => (float[n] y) '
    "{ z = Constant<value = int8 {0}>() q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
)


def by_onnx(x: np.ndarray, scale: float) -> np.ndarray:
    (found,) = ReferenceEvaluator(MODEL).run(None, {"x": x, "s": np.float32(scale)})
    return np.asarray(found)


@pytest.mark.parametrize("scale", [2.0**-14, 0.03125, 0.1, 7.0])
def test_it_is_what_onnx_makes_of_it(scale: float) -> None:
    scale = float(np.float16(scale))
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32) * np.float32(60 * scale)
    halves = np.arange(-130, 130, dtype=np.float32) * np.float32(scale) + np.float32(scale / 2)  # ties go to the even
    x = np.concatenate((x, halves))
    np.testing.assert_array_equal(rounded_input(torch.from_numpy(x.copy()), scale).numpy(), by_onnx(x, scale))
    assert (rounded_input(torch.from_numpy(x.copy()), scale * 2).numpy() != by_onnx(x, scale)).any()


@given(size=st.floats(0, 8e6), others=st.lists(st.floats(0, 1), max_size=4))
def test_nothing_that_was_seen_is_cut_off(size: float, others: list[float]) -> None:
    largest = torch.tensor([size * other for other in others] + [size], dtype=torch.float32)
    scale = input_scale(largest)
    assert scale == float(np.float16(scale))  # which engines that compute in float16 hold
    x = torch.cat((largest, -largest))
    assert float((rounded_input(x.clone(), scale) - x).abs().max()) <= scale / 2 * (1 + 1e-5)
    if float(largest.max()) > 0.01:  # and it is no larger than it must be: 11 bits
        assert scale <= float(largest.max()) / 127 * (1 + 2**-10)


def test_an_input_that_no_scale_holds_and_one_of_zeros() -> None:
    assert math.isinf(input_scale(torch.tensor([65504.0 * 128])))
    assert math.isinf(input_scale(torch.tensor([float("inf")])))
    assert math.isinf(input_scale(torch.tensor([float("nan")])))
    assert input_scale(torch.zeros(3)) > 0


@pytest.mark.parametrize("width", [16, 256])
def test_the_noise_is_what_rounding_does(width: int) -> None:
    """Within 5 %: 4,000 tokens, and inputs of many codes."""
    generator = torch.Generator().manual_seed(width)
    x, matrix = torch.randn(4000, width, generator=generator), torch.randn(24, width, generator=generator)
    scale = input_scale(x.abs().amax(0))
    found = (rounded_input(x.clone(), scale) - x) @ matrix.T
    assert float(found.square().sum(1).mean()) == pytest.approx(noise(matrix, scale), rel=0.05)
    assert noise(matrix, 2 * scale) == pytest.approx(4 * noise(matrix, scale))


def test_a_fitted_scale_changes_the_outputs_least() -> None:
    """One number in a thousand is ten times as large: worth cutting off a little of, and never more than half."""
    generator = torch.Generator().manual_seed(3)
    x, matrix = torch.randn(512, 64, generator=generator), torch.randn(700, 64, generator=generator)
    x[torch.rand(512, 64, generator=generator) < 1e-3] *= 4
    largest = x.abs().amax(0)
    found = fitted_scale(largest, x, [matrix[:300], matrix[300:]])
    assert input_scale(largest * 0.5) <= found < input_scale(largest)
    assert input_error(x, matrix, found) < input_error(x, matrix, input_scale(largest))
    assert torch.equal(x.abs().amax(0), largest)  # what was seen stays as it was
    exact = (torch.from_numpy(by_onnx(x.numpy(), found)) - x).double() @ matrix.double().T
    assert input_error(x, matrix, found) == pytest.approx(float(exact.square().sum(1).mean()), rel=1e-4)


def test_one_far_number_that_matters_is_not_cut_off() -> None:
    x, matrix = torch.full((64, 8), 0.5), torch.ones(4, 8)
    x[0, 0] = 500
    assert fitted_scale(x.abs().amax(0), x, [matrix]) == input_scale(x.abs().amax(0))


def test_a_scale_that_float16_doesnt_hold_is_told() -> None:
    x = torch.full((4, 8), 1e7)
    assert math.isinf(fitted_scale(x.amax(0), x, [torch.ones(4, 8)]))
