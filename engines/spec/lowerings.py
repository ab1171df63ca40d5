"""The forms of graph that `export` writes, and which precisions each has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_aot.engines.spec.precisions import PRECISIONS, PrecisionRow
from qwen_aot.engines.spec.targets import TARGETS, Target


@dataclass(frozen=True, slots=True)
class LoweringFacts:
    """One form of graph.

    Attributes:
        target: whose compute type the graph has where weights are quantized, and whose weight layout.
    """

    target: Target

    @property
    def precisions(self) -> Mapping[str, PrecisionRow]:
        """By name; the first is the default."""
        return {name: row for name, row in PRECISIONS.items() if self._has(row)}

    def _has(self, row: PrecisionRow) -> bool:
        if TARGETS[self.target].weight_layout == "blocks":
            return self.target in row.targets
        return row.weight_format is not None or not row.is_quantized  # standard ONNX has every compute type


LOWERINGS: Mapping[str, LoweringFacts] = {
    "standard": LoweringFacts(Target.TENSORRT),
    "plugin": LoweringFacts(Target.TENSORRT),
    "ort": LoweringFacts(Target.CPU),
}
