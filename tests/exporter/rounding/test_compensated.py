"""GPTQ against Optimal Brain Quantization as the paper defines it: slow, in float64, an inverse a column."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen_aot.exporter.calibration.moments import Moment
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType
from qwen_aot.exporter.rounding import compensated
from qwen_aot.exporter.rounding.compensated import Compensation, compensation_for
from qwen_aot.exporter.rounding.grid import Grid, fit_grid
from tests import e4m3

SIZE = 16
FORM = CodeForm(4, SIZE, np.dtype(np.float16), has_zero_points=True)


def drawn(seed: int, rows: int, width: int, *, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the moment of correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(0, 1, (width, width)) * np.exp(rng.normal(0, 0.7, width))
    inputs = rng.normal(0, 1, (tokens or 4 * width, width)) @ mixing / width**0.5
    weight = torch.from_numpy(rng.normal(0, 0.05, (rows, width)).astype(np.float32))
    return weight, torch.from_numpy((inputs.T @ inputs / len(inputs)).astype(np.float32))


def obq(weight: NDArray[np.float64], damped: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """Codes, by equations (2) and (3) of the paper (arXiv:2210.17323), for one fixed order of columns.

    Each column's error is made up for by those that are left, by the inverse of their part of the Hessian.
    """
    width = weight.shape[1]
    rest, codes = weight.copy(), np.empty_like(weight)
    scales, zeros = grid.scales.double().numpy(), grid.zeros.double().numpy()
    left = sorted(range(width), key=lambda column: -damped[column, column])
    while left:
        column, group = left[0], left[0] // grid.form.group_size
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.where(scales[:, group] == 0, 0, rest[:, column] / scales[:, group])
        codes[:, column] = np.clip(np.rint(steps) + zeros[:, group], 0, 2**grid.form.bits - 1)
        values = (codes[:, column] - zeros[:, group]) * scales[:, group]
        rest[:, left] -= np.outer((rest[:, column] - values) / inverse[0, 0], inverse[0])
        left = left[1:]
    return codes


def test_codes_of_e4m3_change_the_outputs_less_than_the_nearest() -> None:
    weight, moment = drawn(3, 24, 4 * SIZE)
    form = CodeForm(8, 4 * SIZE, FORM.scale_dtype, has_input_scale=True, code_type=CodeType.E4M3)
    grid = fit_grid(weight, moment.diagonal(), form)
    found = Compensation(moment).codes(weight, grid)
    assert set(found.flatten().tolist()) <= set(e4m3.NUMBERS)
    nearest = output_error(grid.values(grid.nearest(weight)), weight, moment)
    assert output_error(grid.values(found), weight, moment) < 0.7 * nearest
    assert torch.equal(Compensation(moment.diagonal().diag()).codes(weight, grid), grid.nearest(weight))


def output_error(values: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor) -> float:
    difference = values.double() - weight.double()
    return float(((difference @ moment.double()) * difference).sum())


@pytest.mark.parametrize("width", [SIZE, 5 * SIZE, 9 * SIZE])  # one block of columns, one and a bit, two and a bit
def test_codes_are_those_of_the_papers_equations(width: int) -> None:
    weight, moment = drawn(width, 12, width)
    grid = fit_grid(weight, moment.diagonal(), FORM)
    damped = moment.double().numpy() + 0.01 * float(moment.diagonal().double().mean()) * np.eye(width)
    expected = obq(weight.double().numpy(), damped, grid)
    found = Compensation(moment).codes(weight, grid).numpy()
    # A number half way between two codes may go either way in float32, and what follows in its row then differs.
    assert (found == expected).all(1).mean() >= 0.75
    assert (found == expected).mean() > 0.97
    # Negative control: rounding to nearest gives other codes.
    assert (grid.nearest(weight).numpy() == expected).mean() < 0.9


def test_with_inputs_that_are_independent_it_rounds_to_nearest() -> None:
    weight, moment = drawn(0, 9, 4 * SIZE)
    grid = fit_grid(weight, moment.diagonal(), FORM)
    assert torch.equal(Compensation(moment.diagonal().diag()).codes(weight, grid), grid.nearest(weight))
    assert not torch.equal(Compensation(moment).codes(weight, grid), grid.nearest(weight))


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 5, 8]), st.booleans())
def test_outputs_are_nearer_than_those_of_rounding_to_nearest(seed: int, groups: int, zeros: bool) -> None:
    """Of all rows together: one row of one may be unlucky."""
    weight, moment = drawn(seed, 24, groups * SIZE)
    grid = fit_grid(weight, moment.diagonal(), CodeForm(4, SIZE, np.dtype(np.float16), has_zero_points=zeros))
    made_up = output_error(grid.values(Compensation(moment).codes(weight, grid)), weight, moment)
    assert made_up <= output_error(grid.values(grid.nearest(weight)), weight, moment)


def test_columns_stay_where_they_are() -> None:
    """A column's largest inputs come first, and its codes go back to its place."""
    weight, moment = drawn(1, 6, 4 * SIZE)
    order = torch.randperm(4 * SIZE, generator=torch.Generator().manual_seed(0))
    whole = CodeForm(4, 4 * SIZE, np.dtype(np.float16), has_zero_points=True)  # one group: any order has the same
    grid = fit_grid(weight, torch.ones(4 * SIZE), whole)
    found = Compensation(moment).codes(weight, grid)
    moved = Compensation(moment[order][:, order]).codes(weight[:, order], grid)
    assert (moved == found[:, order]).float().mean() > 0.99  # the same sums in float32, in another order


def test_the_moment_and_the_matrix_are_kept() -> None:
    weight, moment = drawn(2, 5, 5 * SIZE)
    kept_weight, kept_moment = weight.clone(), moment.clone()
    Compensation(moment).codes(weight, fit_grid(weight, torch.ones(5 * SIZE), FORM))
    assert torch.equal(weight, kept_weight)
    assert torch.equal(moment, kept_moment)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_fewer_tokens_than_columns(tokens: int) -> None:
    """The moment is singular: damping alone makes it invertible, and codes stay in range."""
    weight, moment = drawn(3, 8, 4 * SIZE, tokens=tokens)
    grid = fit_grid(weight, torch.ones(4 * SIZE), FORM)
    codes = Compensation(moment).codes(weight, grid)
    assert ((codes >= 0) & (codes <= 15) & (codes == codes.round())).all()
    made_up = output_error(grid.values(codes), weight, moment)
    assert made_up < output_error(grid.values(grid.nearest(weight)), weight, moment)


def test_columns_that_no_input_reaches_are_rounded_to_nearest() -> None:
    weight, moment = drawn(4, 8, 4 * SIZE)
    dead = torch.arange(4 * SIZE) % 5 == 2
    moment[dead], moment[:, dead] = 0, 0
    grid = fit_grid(weight, torch.ones(4 * SIZE), FORM)
    codes = Compensation(moment).codes(weight, grid)
    assert torch.equal(codes[:, dead], grid.nearest(weight)[:, dead])
    none = Compensation(torch.zeros(4 * SIZE, 4 * SIZE)).codes(weight, grid)
    assert torch.equal(none, grid.nearest(weight))


def test_one_column_a_group() -> None:
    grid = Grid(CodeForm(4, 1, np.dtype(np.float16)), torch.tensor([[0.5]]), torch.tensor([[8.0]]))
    assert Compensation(torch.tensor([[3.0]])).codes(torch.tensor([[1.2]]), grid).tolist() == [[10.0]]


def test_a_scale_of_zero_gives_no_nan() -> None:
    weight, moment = drawn(5, 4, 2 * SIZE)
    weight[:, :SIZE] = 0
    grid = fit_grid(weight, torch.ones(2 * SIZE), FORM)
    codes = Compensation(moment).codes(weight, grid)
    assert not grid.values(codes)[:, :SIZE].any()
    assert codes.isfinite().all()


def test_damping_grows_until_there_is_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment spoilt in its last digits isn't positive: as much more is added as it needs, and no more."""
    weight, moment = drawn(6, 8, 3 * SIZE)
    lowest = torch.linalg.eigvalsh(moment.double())[0]
    spoilt = moment - torch.eye(3 * SIZE) * (float(lowest) + 0.05 * float(moment.diagonal().mean()))
    grid = fit_grid(weight, torch.ones(3 * SIZE), FORM)
    found = Compensation(spoilt).codes(weight, grid)
    assert torch.equal(found, Compensation(spoilt, damping=0.1).codes(weight, grid))
    assert not torch.equal(found, Compensation(spoilt, damping=1.0).codes(weight, grid))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (0, 1)], ids=["diagonal", "beside"])
def test_a_moment_that_isnt_one(wrong: float, place: tuple[int, int]) -> None:
    _, moment = drawn(7, 1, SIZE)
    moment[place], moment[place[::-1]] = wrong, wrong
    with pytest.raises(ValueError, match="isn't a finite number"):
        Compensation(moment)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = drawn(8, 8, 4 * SIZE)
    grid = fit_grid(weight, torch.ones(4 * SIZE), FORM)
    expected = Compensation(moment).codes(weight, grid)
    monkeypatch.setattr(compensated, "_BLOCK", 7)
    monkeypatch.setattr(compensated, "_MOVED_ROWS", 5)
    assert (Compensation(moment).codes(weight, grid) == expected).float().mean() > 0.99


def test_too_few_tokens_say_more_of_the_texts() -> None:
    inputs = torch.randn(31, 64, generator=torch.Generator().manual_seed(0))
    moment = Moment.empty(64)
    moment.add(inputs)
    assert compensation_for(moment) is None
    moment.add(inputs[:1])
    assert compensation_for(moment) is not None
    assert compensation_for(None) is None
