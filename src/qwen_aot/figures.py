"""How every plot of this package looks, and how one becomes a file. Needs the extra `plot`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, which is pale on white; and a
# mark for each, for who prints without colours. https://jfly.uni-koeln.de/color/
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKS = "osD^vP*"
_DOTS_PER_INCH = 150
_LOGARITHMIC_FROM = 20.0  # times between the least and the largest: on a linear axis the small ones lie on the line


def style(index: int) -> tuple[str, str]:
    """Colour and mark of the series with that number; they begin again after seven."""
    return _COLOURS[index % len(_COLOURS)], _MARKS[index % len(_MARKS)]


def render(figure: Figure, suffix: str) -> bytes:
    """The figure as a file's content; the same figure gives the same bytes.

    Args:
        figure: any.
        suffix: .png or .svg.
    """
    content = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else None
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "qwen-aot"}):  # or its ids are drawn at random
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a name: it is drawn as a box
        figure.savefig(content, format=suffix.removeprefix("."), dpi=_DOTS_PER_INCH, metadata=metadata)
    return content.getvalue()


def scale(axes: Axes, values: Sequence[float]) -> None:
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


def tidy(axes: Axes) -> None:
    """A grid, and no frame above and to the right."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
