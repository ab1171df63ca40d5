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

from qwen_aot.exporter.checkpoint.encoding import CodeType
from qwen_aot.exporter.rounding.inputs import (
    fitted_scale,
    input_error,
    input_scale,
    nearest_e4m3,
    noise,
    rounded_input,
)
from tests.e4m3 import NUMBERS

E4M3 = CodeType.E4M3
TYPES = {CodeType.INTEGER: onnx.TensorProto.INT8, E4M3: onnx.TensorProto.FLOAT8E4M3FN}
MODELS = {
    code_type: onnx.helper.make_model(
        onnx.parser.parse_graph(
            "g (float[n] x, float s) => (float[n] y) "
            f"{{ q = QuantizeLinear<output_dtype = {dtype}>(x, s) y = DequantizeLinear(q, s) }}"
        ),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
    )
    for code_type, dtype in TYPES.items()
}


def by_onnx(x: np.ndarray, scale: float, code_type: CodeType = CodeType.INTEGER) -> np.ndarray:
    (found,) = ReferenceEvaluator(MODELS[code_type]).run(None, {"x": x, "s": np.float32(scale)})
    return np.asarray(found)


@pytest.mark.parametrize("code_type", CodeType)
@pytest.mark.parametrize("scale", [2.0**-14, 0.03125, 0.1, 7.0])
def test_it_is_what_onnx_makes_of_it(scale: float, code_type: CodeType) -> None:
    scale = float(np.float16(scale))
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32) * np.float32(60 * scale)
    halves = np.arange(-130, 130, dtype=np.float32) * np.float32(scale) + np.float32(scale / 2)  # ties go to the even
    far = np.array([447, 449, 463, 480, 1e4], np.float32) * np.float32(scale)
    x = np.concatenate((x, halves, far, -far, halves / 512))
    found = rounded_input(torch.from_numpy(x.copy()), scale, code_type).numpy()
    np.testing.assert_array_equal(found, by_onnx(x, scale, code_type))
    other = E4M3 if code_type is CodeType.INTEGER else CodeType.INTEGER
    for wrong in ((scale * 2, code_type), (scale, other)):
        assert (rounded_input(torch.from_numpy(x.copy()), *wrong).numpy() != by_onnx(x, scale, code_type)).any()


@given(st.floats(-600, 600, width=32))
def test_the_nearest_number_of_e4m3_is_the_nearest(x: float) -> None:
    found = float(nearest_e4m3(torch.tensor([x])))
    assert found in NUMBERS
    assert abs(found - x) == min(abs(other - x) for other in NUMBERS)


@given(size=st.floats(0, 2.8e7), others=st.lists(st.floats(0, 1), max_size=4))
def test_no_e4m3_that_was_seen_is_cut_off(size: float, others: list[float]) -> None:
    largest = torch.tensor([size * other for other in others] + [size], dtype=torch.float32)
    scale = input_scale(largest, E4M3)
    assert scale == float(np.float16(scale))
    assert float(largest.max()) / scale <= 448
    if float(largest.max()) > 0.03:
        assert scale <= float(largest.max()) / 448 * (1 + 2**-10)


@pytest.mark.parametrize("deviation", [0.02, 1.0, 300.0])
def test_the_noise_of_e4m3_is_what_rounding_does(deviation: float) -> None:
    """Within 8 %: numbers of a bell curve aren't of all sizes alike."""
    generator = torch.Generator().manual_seed(5)
    x, matrix = torch.randn(4000, 64, generator=generator), torch.randn(24, 64, generator=generator)
    x *= deviation * torch.linspace(0.1, 3, 64)
    scale = input_scale(x.abs().amax(0), E4M3)
    found = float(((rounded_input(x.clone(), scale, E4M3) - x) @ matrix.T).square().sum(1).mean())
    squares = x.square().mean(0)
    assert found == pytest.approx(noise(matrix, scale, squares, E4M3), rel=0.08)
    assert noise(matrix, 8 * scale, squares, E4M3) == pytest.approx(found, rel=0.1)  # floats are as fine at any scale
    assert noise(matrix, 8 * scale, squares) == pytest.approx(64 * noise(matrix, scale, squares))


def test_a_fitted_scale_of_e4m3_cuts_nothing_off() -> None:
    generator = torch.Generator().manual_seed(3)
    x, matrix = torch.randn(512, 64, generator=generator), torch.randn(700, 64, generator=generator)
    largest = x.abs().amax(0)
    found = fitted_scale(largest, x, [matrix[:300], matrix[300:]], E4M3)
    whole = input_scale(largest, E4M3)
    assert whole <= found <= 2 * whole * (1 + 2**-10)
    assert input_error(x, matrix, found, E4M3) <= input_error(x, matrix, whole, E4M3)
    exact = (torch.from_numpy(by_onnx(x.numpy(), found, E4M3)) - x).double() @ matrix.double().T
    assert input_error(x, matrix, found, E4M3) == pytest.approx(float(exact.square().sum(1).mean()), rel=1e-4)


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
    squares = x.square().mean(0)
    assert float(found.square().sum(1).mean()) == pytest.approx(noise(matrix, scale, squares), rel=0.05)
    assert noise(matrix, 2 * scale, squares) == pytest.approx(4 * noise(matrix, scale, squares))


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
