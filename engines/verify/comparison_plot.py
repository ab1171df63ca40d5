"""Draws a comparison: what bundles take on disk against what they lose, and the error behind each of their layers."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

SUFFIXES = (".png", ".svg")

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, which is pale on white; and a
# mark for each, for who prints without colours. https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKS = "osD^vP*"
_DOTS_PER_INCH = 150
_PANEL_INCHES = 4.2
_PANEL_POINTS = 230  # of it, between the axes
_LINE_POINTS = 13.0  # of a name
_NEAR = 0.3  # of the range of sizes: names of bundles that are nearer to each other may meet
_LOGARITHMIC_FROM = 20.0  # times between the least and the largest: on a linear axis the small ones lie on the line


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
    styles = {
        bundle.name: (_COLOURS[index % len(_COLOURS)], _MARKS[index % len(_MARKS)])
        for index, bundle in enumerate(bundles)
    }
    _draw_losses(axes[0], bundles, styles)
    if with_layers:
        _draw_layers(axes[1], with_layers, styles)
    return figure


def render(figure: Figure, suffix: str) -> bytes:
    """The figure as a file's content; the same figure gives the same bytes.

    Args:
        figure: from `draw`.
        suffix: one of SUFFIXES.
    """
    content = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else None
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "qwen-aot"}):  # or its ids are drawn at random
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a name: it is drawn as a box
        figure.savefig(content, format=suffix.removeprefix("."), dpi=_DOTS_PER_INCH, metadata=metadata)
    return content.getvalue()


def _draw_losses(axes: Axes, bundles: Sequence[Drawn], styles: dict[str, tuple[str, str]]) -> None:
    divisor, unit = (1e9, "GB") if max(bundle.weight_bytes for bundle in bundles) >= 1e9 else (1e6, "MB")
    losses = [bundle.kl_divergence for bundle in bundles]
    _scale(axes, losses)
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
    _tidy(axes)


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
    _scale(axes, [error for bundle in bundles for error in bundle.layer_errors or ()])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("median relative error\nof the residual stream")
    legend = axes.legend(frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _tidy(axes)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers where the values are far apart, else one from 0; room above and below."""
    least, most = min(values), max(values)
    if least > 0 and most > _LOGARITHMIC_FROM * least:
        axes.set_yscale("log")
        axes.set_ylim(least / 2, most * 2)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(min(0, least), most * 1.25 if most > 0 else 1)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
