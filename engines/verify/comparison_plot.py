"""Draws a comparison: what bundles take on disk against what they lose, and the error behind each of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwen_aot.figures import scale, style, tidy

_PANEL_INCHES = 4.2
_PANEL_POINTS = 230  # of it, between the axes
_LINE_POINTS = 13.0  # of a name
_NEAR = 0.3  # of the range of sizes: names of bundles that are nearer to each other may meet


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is drawn of one bundle.

    Attributes:
        name: as it is shown.
        weight_bytes: on disk.
        kl_divergence, kl_error: in nats; no error: None.
        layer_errors: median relative differences of the residual stream behind each layer; None: they aren't known.
    """

    name: str
    weight_bytes: int
    kl_divergence: float
    kl_error: float | None
    layer_errors: tuple[float, ...] | None


def draw(bundles: Sequence[Drawn], title: str) -> Figure:
    """A figure of one panel, or of two where the layers of a bundle are known.

    Args:
        bundles: at least one; colours and marks begin again after seven.
        title: above all.
    """
    with_layers = [bundle for bundle in bundles if bundle.layer_errors]
    panels = 2 if with_layers else 1
    figure = Figure(figsize=(8, _PANEL_INCHES * panels), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    styles = {bundle.name: style(index) for index, bundle in enumerate(bundles)}
    _draw_losses(axes[0], bundles, styles)
    if with_layers:
        _draw_layers(axes[1], with_layers, styles)
    return figure


def _draw_losses(axes: Axes, bundles: Sequence[Drawn], styles: dict[str, tuple[str, str]]) -> None:
    divisor, unit = (1e9, "GB") if max(bundle.weight_bytes for bundle in bundles) >= 1e9 else (1e6, "MB")
    losses = [bundle.kl_divergence for bundle in bundles]
    scale(axes, losses)
    sizes = [bundle.weight_bytes for bundle in bundles]
    middle, width = (max(sizes) + min(sizes)) / 2, max(sizes) - min(sizes)
    raised = _raised(sizes, [_height(axes, loss) for loss in losses], width)
    for bundle, up in zip(bundles, raised, strict=True):
        colour, mark = styles[bundle.name]
        size = bundle.weight_bytes / divisor
        axes.errorbar(size, bundle.kl_divergence, bundle.kl_error, color=colour, marker=mark, markersize=7, capsize=3)
        is_left = bundle.weight_bytes <= middle
        axes.annotate(
            bundle.name,
            (size, bundle.kl_divergence),
            (9 if is_left else -9, up),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="center",
            color=colour,
            parse_math=False,
        )
    axes.margins(x=0.15)
    axes.set_xlabel(f"weights on disk, {unit}")
    axes.set_ylabel("KL divergence, nats")
    tidy(axes)


def _height(axes: Axes, value: float) -> float:
    """Of a value on the y axis, in points from the bottom, about."""
    bottom, top = axes.transScale.transform([(1, at) for at in axes.get_ylim()])[:, 1]
    return float((axes.transScale.transform((1, value))[1] - bottom) / (top - bottom) * _PANEL_POINTS)


def _raised(sizes: Sequence[int], heights: Sequence[float], width: float) -> list[float]:
    """How many points each name goes up so that it doesn't lie on that of a bundle of about the same size below it."""
    placed: list[tuple[int, float]] = []
    raised = [0.0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: heights[index]):
        height = heights[index]
        for size, below in placed:  # from the lowest up
            if abs(size - sizes[index]) <= _NEAR * width and abs(below - height) < _LINE_POINTS:
                height = below + _LINE_POINTS
        placed = sorted([*placed, (sizes[index], height)], key=lambda each: each[1])
        raised[index] = height - heights[index]
    return raised


def _draw_layers(axes: Axes, bundles: Sequence[Drawn], styles: dict[str, tuple[str, str]]) -> None:
    for bundle in bundles:
        assert bundle.layer_errors is not None
        colour, mark = styles[bundle.name]
        (line,) = axes.plot(
            range(len(bundle.layer_errors)), bundle.layer_errors, color=colour, marker=mark, markersize=4
        )
        line.set_label(bundle.name)
    scale(axes, [error for bundle in bundles for error in bundle.layer_errors or ()])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("median relative error\nof the residual stream")
    legend = axes.legend(frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    tidy(axes)
