"""What `compare` shows: a row for the reference and one for each bundle, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qwen_aot.runtime.cli.console import size, stdout
from qwen_aot.runtime.cli.tables import print_table

if TYPE_CHECKING:
    from qwen_aot.engines.verify.comparison import Scored
    from qwen_aot.engines.verify.per_layer import LayerReport
    from qwen_aot.runtime.measure.rounds import Spread

_HEADINGS = ("bundle", "size", "bits", "KL, nats", "perplexity", "ratio", "top-1", "greedy", "tok/s")
_NOTHING = "-"
_MOST_DECIMALS = 5  # beyond them, and from this number on, powers of ten are written
_LARGEST_PLAIN = 1e6


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        name: as it is shown.
        bundle: the folder as given; None: this is the reference.
        facts: what the manifest says: target, precision, quantization; of the reference nothing.
        weight_bytes: on disk; of the reference 4 a parameter.
        num_parameters: of the model.
        scored: how it answers; None: it wasn't compared.
        speed: greedy decoding, tokens a second; None of the reference, and where it wasn't compared.
        not_compared: why.
        layers: the error behind each layer; None: it wasn't asked for, or can't be told.
        no_layers: why it can't.
    """

    name: str
    bundle: str | None
    facts: dict[str, Any]
    weight_bytes: int
    num_parameters: int
    scored: Scored | None = None
    speed: Spread | None = None
    not_compared: str | None = None
    layers: LayerReport | None = None
    no_layers: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """All bytes of the weights over all parameters: scales, zero points and padding are in it."""
        return 8 * self.weight_bytes / self.num_parameters

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "bundle": self.bundle,
            **self.facts,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "accuracy": None if self.scored is None else asdict(self.scored.overall),
            "by_kind": {} if self.scored is None else {k: asdict(each) for k, each in self.scored.by_kind.items()},
            "decode_tokens_per_second": None if self.speed is None else asdict(self.speed),
            "not_compared": self.not_compared,
            "layers": [] if self.layers is None else [asdict(layer) for layer in self.layers.layers],
            "no_layers": self.no_layers,
        }


def show(rows: Sequence[Row], title: str) -> None:
    """The table, and where there are several kinds of text another one by kind."""
    console = stdout()
    print_table(console, _HEADINGS, [_cells(row) for row in rows], numbers=_HEADINGS[1:], title=title)
    compared = [row for row in rows if row.bundle is not None and row.scored is not None]
    kinds = list(compared[0].scored.by_kind) if compared and compared[0].scored is not None else []
    if len(kinds) > 1:
        cells = [
            (row.name, *(with_error(each.kl_divergence, each.kl_error) for each in row.scored.by_kind.values()))
            for row in compared
            if row.scored is not None
        ]
        print()
        print_table(console, ("bundle", *kinds), cells, numbers=kinds, title="KL by kind of text, nats")


def _cells(row: Row) -> tuple[str, ...]:
    weights = size(row.weight_bytes), f"{row.bits_per_weight:.2f}"
    if row.scored is None:
        return (row.name, *weights, *[_NOTHING] * (len(_HEADINGS) - 3))
    found = row.scored.overall
    return (
        row.name,
        *weights,
        _NOTHING if row.bundle is None else with_error(found.kl_divergence, found.kl_error),
        with_error(found.perplexity, found.perplexity_error),
        f"{found.perplexity_ratio:.3f}",
        f"{100 * found.top1_agreement:.1f}%",
        f"{100 * found.greedy_agreement:.1f}%",
        _NOTHING if row.speed is None else f"{row.speed.median:.1f}",
    )


def with_error(value: float, error: float | None) -> str:
    """A number and its standard error, both to the error's first digit, or where that is a 1 to its second."""
    if error is None:
        return f"{value:.4g}"
    if not error:
        return f"{value:.3g} ± 0"
    exponent = math.floor(math.log10(error))
    decimals = -exponent + (error < 2 * 10**exponent)
    if decimals > _MOST_DECIMALS or value >= _LARGEST_PLAIN:
        return f"{value:.1e} ± {error:.0e}"
    return f"{value:.{max(decimals, 0)}f} ± {error:.{max(decimals, 0)}f}"
