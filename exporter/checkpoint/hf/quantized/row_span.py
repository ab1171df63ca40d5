"""Some rows of a quantized weight as a weight of its own: what a file holds as one (`attn.c_attn`) is given apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qwen_aot.exporter.checkpoint.encoding import EncodedRows, Encoding
from qwen_aot.exporter.checkpoint.hf.quantized.linear import QuantizedLinear, StoredLinear


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Rows of a larger weight (see `linear.QuantizedLinear`).

    Attributes:
        whole: the weight that is stored.
        stored: its tensors, with the name and the shape of this part.
        first: the part's first row in the whole.
    """

    whole: QuantizedLinear
    stored: StoredLinear
    first: int

    @property
    def encoding(self) -> Encoding:
        """That of the whole."""
        return self.whole.encoding

    def rows(self, start: int, stop: int) -> EncodedRows:
        """Rows `start` to `stop` of the part; nothing of the others is unpacked."""
        return self.whole.rows(self.first + start, self.first + stop)


def separate_rows(
    linear: QuantizedLinear, weights: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[QuantizedLinear]:
    """What one stored weight holds: itself, or each of the weights whose rows stand behind each other in it.

    Args:
        linear: opened.
        weights: the names by which its parts are given, in the order of their rows.
        shapes: of the weights, by these names.
    """
    if len(weights) == 1:
        yield linear
        return
    first = 0
    for weight in weights:
        rows, columns = shapes[weight]
        yield RowSpan(linear, replace(linear.stored, weight=weight, shape=(rows, columns)), first)
        first += rows


def stored_bytes(linear: QuantizedLinear) -> int:
    """Of all that holds a weight; a part of a larger one has its rows' share."""
    total = sum(part.stored_bytes for part in linear.stored.parts.values())
    if not isinstance(linear, RowSpan):
        return total
    return total * linear.stored.shape[0] // linear.whole.stored.shape[0]
