"""The plot holds what it was given, in files that are images, the same each time."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
from matplotlib.axes import Axes

from qwen_aot.engines.verify.comparison_plot import Drawn, _raised, draw

BUNDLES = [
    Drawn("int8", 154_000_000, 0.005, 0.0003, (0.01, 0.02, 0.03)),
    Drawn("int4", 106_000_000, 0.236, 0.011, (0.1, 0.2, 0.35)),
    Drawn("no $layers_1$ 中", 500_000_000, 0.002, None, None),
]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def points(axes: Axes) -> list[tuple[float, float]]:
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if len(line.get_xdata()) == 1
    ]


def test_sizes_and_losses() -> None:
    axes = draw(BUNDLES, "a title").axes[0]
    assert points(axes)[0] == (154.0, 0.005)
    assert {point for point in points(axes) if point[1] in (0.005, 0.236, 0.002)} >= {(154, 0.005), (106, 0.236)}
    assert texts(axes) == [bundle.name for bundle in BUNDLES]
    assert (axes.get_xlabel(), axes.get_yscale()) == ("weights on disk, MB", "log")
    low, high = axes.get_ylim()
    assert low < 0.002 and high > 0.236


def test_layers_are_those_of_bundles_that_have_them() -> None:
    figure = draw(BUNDLES, "a title")
    assert len(figure.axes) == 2
    lines = {line.get_label(): list(map(float, line.get_ydata())) for line in figure.axes[1].lines}
    assert lines == {"int8": [0.01, 0.02, 0.03], "int4": [0.1, 0.2, 0.35]}
    colours = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert {line.get_label(): line.get_color() for line in figure.axes[1].lines} == {
        name: colours[name] for name in ("int8", "int4")
    }


def test_without_layers_there_is_one_panel() -> None:
    assert len(draw(BUNDLES[2:], "a title").axes) == 1


@pytest.mark.parametrize("losses", [(0.0, 0.2), (-1e-17, 0.2), (0.1, 0.2), (0.0, 0.0), (-1e-17, -1e-17)])
def test_losses_that_a_logarithm_does_not_hold(losses: tuple[float, float]) -> None:
    bundles = [Drawn(str(loss), 10**9, loss, None, None) for loss in losses]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = draw(bundles, "").axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "linear" and low <= min(losses) and high > max(losses)
    assert axes.get_xlabel() == "weights on disk, GB"


def test_many_bundles_begin_colours_again() -> None:
    bundles = [Drawn(f"b{index}", 10**8 + index, 0.1, None, None) for index in range(9)]
    colours = [text.get_color() for text in draw(bundles, "").axes[0].texts]
    assert colours[7] == colours[0] and len(set(colours)) == 7


def test_names_that_would_meet_go_up() -> None:
    heights = [50.0, 51.0, 52.0, 60.0, 200.0]
    raised = _raised([100] * 5, heights, 100.0)
    places = [height + up for height, up in zip(heights, raised, strict=True)]
    assert all(above - below >= 13 for below, above in pairwise(places))
    assert raised[0] == raised[4] == 0
    assert _raised([100, 200], [50.0, 50.0], 100.0) == [0, 0]  # beside each other
