"""Scaling before rounding: it changes no answer by itself, and the factor that is taken loses less than none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_aot.exporter.calibration.decoder_layer import (
    DecoderLayer,
    Place,
    Reading,
    Weights,
    load_weights,
    readings,
)
from qwen_aot.exporter.calibration.moments import Moment, Moments
from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.model.tensors import Role
from qwen_aot.exporter.rounding import scaling
from qwen_aot.exporter.rounding.grid import fit_grid
from qwen_aot.exporter.rounding.importance import importance_of
from qwen_aot.exporter.rounding.inputs import input_scale, rounded_input
from qwen_aot.exporter.rounding.scaling import Site, scale_site, sites
from tests.checkpoints import save_tiny

T = 24
FORM = CodeForm(4, 16, np.dtype(np.float16))
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "gqa": {"kv_heads": 2},
    "wide heads": {"kv_heads": 1, "head_dim": 32},
    "moe": {"moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}},
}
Stored = Callable[[Tensor], Tensor]


def as_it_is(weight: Tensor) -> Tensor:
    return weight


def as_half(weight: Tensor) -> Tensor:
    return weight.half().float()


def as_bfloat16(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


class Layer:
    """A tiny layer with inputs of very different sizes, and what it sees."""

    def __init__(self, folder: Path, kind: str) -> None:
        save_tiny(folder, layers=1, **MODELS[kind])
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(2, T, 64, generator=generator)
        with open_checkpoint(folder) as checkpoint:
            self.config = checkpoint.config
            self.weights = load_weights(checkpoint, 0)
        for place in ((Role.INPUT_NORM, None), (Role.POST_ATTENTION_NORM, None)):
            self.weights[place] *= torch.exp(1.5 * torch.randn(64, generator=generator))
            self.weights[place][5] = 0  # a column that is never used
            self.weights[place][6] *= -1
        self.found = list(readings(self.config, is_sparse=self.config.is_sparse(0)))
        self.forms = {place: FORM for reading in self.found for place in reading.places}
        self.compute = DecoderLayer(self.config, T)

    def sites(self) -> list[Site]:
        return list(sites(self.config, self.found))

    def moments(self) -> Moments:
        moments = Moments()
        self.compute(self.weights, self.hidden, moments.observe)
        return moments

    def output(self, weights: Weights) -> Tensor:
        """In float64: what is left is the algebra."""
        compute = DecoderLayer(self.config, T)
        compute._cos, compute._sin = compute._cos.double(), compute._sin.double()
        return compute({place: weight.double() for place, weight in weights.items()}, self.hidden.double())


@pytest.fixture(scope="module", params=MODELS)
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return Layer(tmp_path_factory.mktemp("layer"), request.param)


def changed(layer: Layer, weights: Weights) -> float:
    """Of the layer's output, relative to its largest number."""
    want = layer.output(layer.weights)
    return float((layer.output(weights) - want).abs().max() / want.abs().max())


def test_every_site_keeps_the_layers_answer(layer: Layer) -> None:
    """Any factor: 1e-5 is float32's, in which weights are scaled."""
    for number, site in enumerate(layer.sites()):
        weights = dict(layer.weights)
        width = weights[site.readings[0].places[0]].shape[1]
        generator = torch.Generator().manual_seed(number)
        factor = torch.exp(torch.randn(width, generator=generator))
        if site.repeats > 1:
            factor = factor.view(-1, site.repeats, site.head_dim)[:, :1].expand(-1, site.repeats, -1).flatten()
        scaling._apply(site, weights, factor)
        moved = [place for place in weights if weights[place] is not layer.weights[place]]
        assert set(moved) >= {place for reading in site.readings for place in reading.places}
        assert changed(layer, weights) < 1e-5
        # Negative control: what makes the input isn't divided.
        weights[site.made_by[0]] = layer.weights[site.made_by[0]]
        assert changed(layer, weights) > 1e-2


def test_sites_cover_every_matrix_once(layer: Layer) -> None:
    covered = [place for site in layer.sites() for reading in site.readings for place in reading.places]
    assert sorted(covered, key=str) == sorted(layer.forms, key=str)


@pytest.mark.parametrize("stored", [as_it_is, as_half, as_bfloat16])
def test_what_is_saved_gives_the_layers_answer(layer: Layer, stored: Stored) -> None:
    """With norms and routers as they are saved: the factors found make up for a norm's rounding."""
    layer_weights = {
        place: stored(weight) if place not in layer.forms else weight for place, weight in layer.weights.items()
    }
    rounded = Layer.__new__(Layer)
    rounded.__dict__.update(layer.__dict__, weights=layer_weights)
    moments = rounded.moments().of
    weights = dict(layer_weights)
    found = [scale_site(site, weights, moments, rounded.forms, stored) for site in rounded.sites()]
    assert min(found) < 0.98
    # v's bias is divided, and rounded again: 2 ** -9 of it in bfloat16.
    saved = {place: stored(weight) if place not in layer.forms else weight for place, weight in weights.items()}
    saved[Role.VALUE_BIAS, None] = weights[Role.VALUE_BIAS, None]
    assert changed(rounded, saved) < 1e-5


@pytest.mark.parametrize("stored", [as_half, as_bfloat16])
def test_the_true_error_of_the_outputs_is_lower(layer: Layer, stored: Stored) -> None:
    """Of each site's outputs, from the tokens themselves: the moments are the code's own."""
    sums = np.zeros(2)
    for site in layer.sites():
        weights, moments = dict(layer.weights), layer.moments().of
        seen: dict[Reading, Tensor] = {}
        layer.compute(weights, layer.hidden, lambda reading, x, seen=seen: seen.__setitem__(reading, x))  # type: ignore[misc]
        without = true_error(site, weights, seen)
        said = scale_site(site, weights, moments, layer.forms, stored)
        place = site.readings[0].places[0]
        factor = weights[place] / layer.weights[place]
        factor = torch.where(layer.weights[place] == 0, torch.ones(()), factor)[0]
        if said == 1.0:
            assert torch.equal(weights[place], layer.weights[place])
            continue
        scaled = {reading: seen[reading] / factor for reading in site.readings if reading in seen}
        found = true_error(site, weights, scaled)
        sums += (found, without)
        assert found < without
        assert found / without == pytest.approx(said, abs=0.15)  # the prior of importance is in other columns
    assert sums[0] < 0.95 * sums[1]


def true_error(
    site: Site, weights: Weights, seen: dict[Reading, Tensor], forms: Mapping[Place, CodeForm] | None = None
) -> float:
    total = 0.0
    for reading, x in seen.items():
        if reading not in site.readings or (forms is not None and reading.places[0] not in forms):
            continue
        for place in reading.places:
            matrix = weights[place]
            moment = Moment.empty(x.shape[1])
            moment.add(x)
            form = FORM if forms is None else forms[place]
            grid = fit_grid(matrix, importance_of(moment, x.shape[1]), form)
            read = rounded_input(x.clone(), input_scale(moment.largest)) if form.has_input_scale else x
            difference = read.double() @ grid.values(grid.nearest(matrix)).double().T - x.double() @ matrix.double().T
            total += float(difference.square().sum())
    return total


def test_moments_are_those_of_the_scaled_layer(layer: Layer) -> None:
    weights, moments = dict(layer.weights), layer.moments().of
    for site in layer.sites():
        scale_site(site, weights, moments, layer.forms, as_it_is)
    again = Moments()
    layer.compute(weights, layer.hidden, again.observe)
    for reading, moment in moments.items():
        size = moment.mean().diagonal().max()
        torch.testing.assert_close(again.of[reading].mean() / size, moment.mean() / size, atol=1e-4, rtol=1e-3)


def routed(tmp_path: Path) -> Layer:
    return Layer(tmp_path, "moe")


def router_site(layer: Layer) -> Site:
    return next(site for site in layer.sites() if site.plain)


@pytest.mark.parametrize("stored", [as_half, as_bfloat16])
def test_routers_and_gates_keep_every_digit(tmp_path: Path, stored: Stored) -> None:
    layer = routed(tmp_path)
    site = router_site(layer)
    weights, moments = dict(layer.weights), layer.moments().of
    assert scale_site(site, weights, moments, layer.forms, stored) < 1
    for place in site.plain:
        before, after = stored(layer.weights[place]), stored(weights[place])
        exponent = torch.log2((after / before)[before != 0])
        assert torch.equal(exponent, exponent.round())
        assert exponent.any()
    norm = layer.weights[Role.POST_ATTENTION_NORM, None]
    ratio = stored(weights[Role.POST_ATTENTION_NORM, None]) / stored(norm)
    assert torch.equal(torch.log2(ratio[norm != 0]), torch.log2(ratio[norm != 0]).round())


def test_routers_at_the_end_of_float16s_range_keep_every_digit(tmp_path: Path) -> None:
    """Weights of 1e-4 have their last digits at float16's least number: halves of them would lose these."""
    layer = routed(tmp_path)
    layer.weights[Role.ROUTER, None] *= 1e-4
    site = router_site(layer)
    weights, moments = dict(layer.weights), layer.moments().of
    scale_site(site, weights, moments, layer.forms, as_half)
    exact, scaled = layer.weights[Role.ROUTER, None], weights[Role.ROUTER, None]
    factor = scaled / exact
    assert (factor != 1).any()
    assert ((as_half(scaled) / factor - exact).abs() <= (as_half(exact) - exact).abs()).all()
    assert ((as_half(scaled / 8) * 8 - scaled).abs() > (as_half(scaled) - scaled).abs()).any()  # negative control


def test_inputs_that_are_all_zero_are_left_alone(tmp_path: Path) -> None:
    layer = Layer(tmp_path, "dense")
    layer.weights[Role.INPUT_NORM, None].zero_()
    weights, moments = dict(layer.weights), layer.moments().of
    assert scale_site(layer.sites()[0], weights, moments, layer.forms, as_half) == 1.0
    assert all(torch.equal(weights[place], layer.weights[place]) for place in weights)


def test_a_site_that_no_token_reached_is_left_alone(tmp_path: Path) -> None:
    layer = Layer(tmp_path, "dense")
    weights = dict(layer.weights)
    assert all(scale_site(site, weights, {}, layer.forms, as_half) == 1.0 for site in layer.sites())
    assert all(weights[place] is layer.weights[place] for place in weights)


def test_an_expert_that_no_token_chose_is_scaled_with_the_others(tmp_path: Path) -> None:
    """They share one norm, so that the layer's answers stay if a token does choose it."""
    layer = routed(tmp_path)
    weights, moments = dict(layer.weights), layer.moments().of
    unseen = next(reading for reading in moments if reading.places[0] == (Role.EXPERT_GATE, 2))
    del moments[unseen]
    assert scale_site(router_site(layer), weights, moments, layer.forms, as_half) < 1
    assert not torch.equal(weights[Role.EXPERT_GATE, 2], layer.weights[Role.EXPERT_GATE, 2])
    assert changed(layer, weights) < 1e-5


def whole_rows(layer: Layer) -> dict[Place, CodeForm]:
    """8 bits, a scale a row, inputs rounded too; experts stay plain."""
    experts = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
    return {
        place: CodeForm(8, layer.weights[place].shape[1], np.dtype(np.float16), has_input_scale=True)
        for place in layer.forms
        if place[0] not in experts
    }


@pytest.mark.parametrize("stored", [as_half, as_bfloat16])
def test_where_inputs_are_rounded_the_true_error_is_lower(layer: Layer, stored: Stored) -> None:
    """Of each site's outputs, from the tokens themselves; inputs here differ in size by a factor of some hundred."""
    forms, sums = whole_rows(layer), np.zeros(2)
    for site in layer.sites():
        weights, moments = dict(layer.weights), layer.moments().of
        seen: dict[Reading, Tensor] = {}
        layer.compute(weights, layer.hidden, lambda reading, x, seen=seen: seen.__setitem__(reading, x))  # type: ignore[misc]
        without = true_error(site, weights, seen, forms)
        said = scale_site(site, weights, moments, forms, stored)
        place = site.readings[0].places[0]
        factor = weights[place] / layer.weights[place]
        factor = torch.where(layer.weights[place] == 0, torch.ones(()), factor)[0]
        scaled = {reading: seen[reading] / factor for reading in site.readings if reading in seen}
        found = true_error(site, weights, scaled, forms)
        if without:
            assert found / without == pytest.approx(said, abs=0.1)  # 48 tokens: rounding errors aren't quite noise
        sums += (found, without)
    assert sums[0] < 0.5 * sums[1]


def test_what_stays_plain_is_scaled_with_the_others_and_not_looked_at(layer: Layer) -> None:
    forms = whole_rows(layer)
    weights, moments = dict(layer.weights), layer.moments().of
    for site in layer.sites():
        scale_site(site, weights, moments, forms, as_it_is)
    assert changed(layer, weights) < 1e-5
    again = Moments()
    layer.compute(weights, layer.hidden, again.observe)
    for reading, moment in moments.items():
        torch.testing.assert_close(again.of[reading].largest, moment.largest, atol=1e-5, rtol=1e-3)
    weights = dict(layer.weights)
    assert [scale_site(site, weights, layer.moments().of, {}, as_it_is) for site in layer.sites()] == [1.0] * len(
        layer.sites()
    )
    assert all(weights[place] is layer.weights[place] for place in weights)
