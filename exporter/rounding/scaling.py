"""Columns that large inputs multiply are made larger before they are rounded, and their inputs smaller.

What made the input gives the factor back exactly: a norm's weights, the rows of v behind attention, the rows of up
behind SwiGLU. Where weights alone are rounded, the factor is AWQ's, a power of the inputs' sizes; where inputs are too,
it is SmoothQuant's, by which both have their share of the largest numbers.

Source: Lin et al., "AWQ" (arXiv:2306.00978), and AutoAWQ's search over one exponent; Xiao et al., "SmoothQuant"
(arXiv:2211.10438), equation 4, whose exponent is searched for each input too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_aot.exporter.calibration.decoder_layer import Place, Reading, Weights
from qwen_aot.exporter.calibration.moments import Moment
from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role
from qwen_aot.exporter.rounding.grid import FACTORS, fit_grid
from qwen_aot.exporter.rounding.importance import importance_of
from qwen_aot.exporter.rounding.inputs import input_scale, noise

_EXPONENTS = tuple(step / 10 for step in range(1, 10))  # AWQ's
_SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # SmoothQuant's
_LEAST_SHARE = 1e-6  # of the largest: what counts as a column's size where it is smaller
_SEARCH_ROWS = 1024  # of a matrix, evenly spread, by whose errors exponents are compared
_WIDEST = (1.0,)  # of 8 bits in whole rows, whose ranges little can be gained by
_COARSE_FACTORS = (1.08, 1.0, 0.92)  # of a group's range, while exponents are compared


@dataclass(frozen=True, slots=True)
class Site:
    """One input that can be scaled.

    Attributes:
        readings: that read it: of experts, each sees only the tokens that chose it.
        plain: matrices that read it too, and aren't rounded.
        made_by: whose weights, or rows and bias, are divided by the factor.
        repeats: heads of queries that share each head of v, whose inputs have one factor; else 1.
        head_dim: columns of a head; K where `repeats` is 1.
    """

    readings: tuple[Reading, ...]
    made_by: tuple[Place, ...]
    plain: tuple[Place, ...] = ()
    repeats: int = 1
    head_dim: int = 0


def sites(config: ModelConfig, found: Sequence[Reading]) -> Iterator[Site]:
    """Where a layer with these readings can be scaled, in the order in which it computes them."""
    by_role = {reading.places[0]: reading for reading in found}
    qkv, output = by_role[Role.QUERY, None], by_role[Role.OUTPUT, None]
    yield Site((qkv,), ((Role.INPUT_NORM, None),))
    repeats = config.num_attention_heads // config.num_key_value_heads
    yield Site((output,), ((Role.VALUE, None), (Role.VALUE_BIAS, None)), repeats=repeats, head_dim=config.head_dim)
    behind_norm = [place for place in by_role if place[0] in (Role.GATE, Role.EXPERT_GATE, Role.SHARED_GATE)]
    plain = ((Role.ROUTER, None), (Role.SHARED_EXPERT_GATE, None))
    yield Site(tuple(by_role[place] for place in behind_norm), ((Role.POST_ATTENTION_NORM, None),), plain)
    for up, down in ((Role.UP, Role.DOWN), (Role.EXPERT_UP, Role.EXPERT_DOWN), (Role.SHARED_UP, Role.SHARED_DOWN)):
        for (role, expert), reading in by_role.items():
            if role is down:
                yield Site((reading,), ((up, expert),))


def scale_site(
    site: Site,
    weights: Weights,
    moments: Mapping[Reading, Moment],
    forms: Mapping[Place, CodeForm],
    stored: Callable[[Tensor], Tensor],
) -> float:
    """Scales what reads an input by the factor at which it rounds best, and divides what makes the input by it.

    Args:
        site: where.
        weights: of the layer, float32; replaced.
        moments: of its inputs; scaled too.
        forms: in which its matrices will be rounded; those that are missing stay plain.
        stored: rounds plain weights to the type in which they are saved, so that no factor is lost there.

    Returns:
        The error of rounding with the factor over the one without; 1 where nothing was gained.
    """
    rounded = [reading for reading in site.readings if reading.places[0] in forms]
    seen = {reading: moments[reading] for reading in rounded if reading in moments}
    if not seen:
        return 1.0
    rounds_inputs = forms[rounded[0].places[0]].has_input_scale
    ones = torch.ones(weights[rounded[0].places[0]].shape[1])
    least = _error(weights, seen, forms, ones, _COARSE_FACTORS)
    best: Tensor | None = None
    for strength in _smoothing(site, weights, seen) if rounds_inputs else _by_size(site, seen):
        factor = _factor(site, weights, strength, stored)
        error = _error(weights, seen, forms, factor, _COARSE_FACTORS)
        if error < least:
            least, best = error, factor
    if best is None:
        return 1.0
    # What a few ranges show must hold for all of them, by which matrices are rounded in the end.
    plain_error, error = (_error(weights, seen, forms, each, FACTORS) for each in (ones, best))
    if not error < plain_error:
        return 1.0
    _apply(site, weights, best)
    for reading in site.readings:
        if reading in moments:
            moments[reading].scaled(best)
    return error / plain_error


def _by_size(site: Site, seen: Mapping[Reading, Moment]) -> Iterator[Tensor]:
    """AWQ's factors [K]: the inputs' mean magnitudes to a power."""
    tokens = sum(moment.tokens for moment in seen.values())
    size = torch.stack([moment.magnitudes * (moment.tokens / tokens) for moment in seen.values()]).sum(0)
    size = size.clamp_min(size.max() * _LEAST_SHARE)
    if site.repeats > 1:
        size = _repeated(site, size.view(-1, site.repeats, site.head_dim).mean(1, keepdim=True))
    for exponent in _EXPONENTS:
        yield size.pow(exponent)


def _smoothing(site: Site, weights: Weights, seen: Mapping[Reading, Moment]) -> Iterator[Tensor]:
    """SmoothQuant's factors [K]: the inputs' largest magnitudes to a power, over the weights' to the rest of it."""
    largest = torch.stack([moment.largest for moment in seen.values()]).amax(0)
    widest = torch.stack([weights[place].abs().amax(0) for reading in seen for place in reading.places]).amax(0)
    if site.repeats > 1:
        by_head = (size.view(-1, site.repeats, site.head_dim).amax(1, keepdim=True) for size in (largest, widest))
        largest, widest = (_repeated(site, size) for size in by_head)
    largest, widest = (size.clamp_min(size.max() * _LEAST_SHARE) for size in (largest, widest))
    for exponent in _SHARES:
        yield largest.pow(exponent) / widest.pow(1 - exponent)


def _repeated(site: Site, of_head: Tensor) -> Tensor:
    """[Hkv, 1, D] -> [K], the same for all heads of queries that share one of v."""
    return of_head.expand(-1, site.repeats, -1).flatten()


def _factor(site: Site, weights: Weights, strength: Tensor, stored: Callable[[Tensor], Tensor]) -> Tensor:
    """[K]: a strength around 1, so that what is made by a norm, and plain numbers, lose no digit."""
    factor = strength / (strength.max() * strength.min()).sqrt()
    plain = [weights[place] for place in site.plain if place in weights]
    role = site.made_by[0][0]
    if plain:  # routers and gates decide by small differences: a power of 2 changes no digit of theirs
        factor = torch.exp2(torch.round(torch.log2(factor)))
        norm = weights[site.made_by[0]]
        keeps = stored(stored(norm) / factor) * factor == stored(norm)
        for matrix in plain:  # but at the ends of float16's range
            keeps &= (stored(stored(matrix) * factor) == stored(matrix) * factor).all(0)
        return torch.where(keeps, factor, torch.ones(()))
    if role in (Role.INPUT_NORM, Role.POST_ATTENTION_NORM):
        norm = weights[site.made_by[0]]
        saved = stored(norm / factor)
        return torch.where(saved == 0, torch.ones(()), norm / saved)
    return factor


def _error(
    weights: Weights,
    moments: Mapping[Reading, Moment],
    forms: Mapping[Place, CodeForm],
    factor: Tensor,
    factors: Sequence[float],
) -> float:
    """The squared difference of some rows' outputs when the scaled matrices, and perhaps inputs, are rounded.

    Of all tokens.
    """
    total = 0.0
    for reading, moment in moments.items():
        mean = moment.mean()
        importance = importance_of(moment, len(factor)) / factor.square()
        for place in reading.places:
            every = -(-len(weights[place]) // _SEARCH_ROWS)
            scaled = weights[place][::every] * factor
            grid = fit_grid(scaled, importance, forms[place], _WIDEST if forms[place].has_input_scale else factors)
            difference = (grid.values(grid.nearest(scaled)) - scaled) / factor
            lost = float(((difference @ mean) * difference).sum())
            if forms[place].has_input_scale:
                code_type = forms[place].code_type
                squares = mean.diagonal() / factor.square()
                lost += noise(scaled, input_scale(moment.largest / factor, code_type), squares, code_type)
            total += moment.tokens * every * lost
    return total


def _apply(site: Site, weights: Weights, factor: Tensor) -> None:
    for reading in site.readings:
        for place in reading.places:
            weights[place] = weights[place] * factor
    for place in site.plain:
        if place in weights:
            weights[place] = weights[place] * factor
    rows = factor
    if site.repeats > 1:
        rows = factor.view(-1, site.repeats, site.head_dim)[:, 0].flatten()
    for place in site.made_by:
        if place in weights:
            made = weights[place]
            weights[place] = made / (rows[:, None] if made.dim() == 2 else rows)
