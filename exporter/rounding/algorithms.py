"""The algorithms by name: what each does with a layer's matrices, a row for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_aot.exporter.checkpoint.encoding import CodeType


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to round.

    Attributes:
        summary: what it does, in a few words.
        uses_texts: it needs what layers read from texts; else weights alone.
        scales: inputs are scaled before matrices are rounded (`exporter.rounding.scaling`).
        rounds_inputs: inputs are rounded too (`exporter.rounding.inputs`), to codes of this type, as weights are; None:
            weights alone, to integers.
        compensates: later columns make up for the errors of earlier ones (`exporter.rounding.compensated`).
    """

    summary: str
    uses_texts: bool = True
    scales: bool = False
    compensates: bool = False
    rounds_inputs: CodeType | None = None


ALGORITHMS: Mapping[str, Algorithm] = {
    "rtn": Algorithm("round to nearest", uses_texts=False),
    "awq": Algorithm("scale by activations, then round to nearest", scales=True),
    "gptq": Algorithm("make up for each column's error in the later ones", compensates=True),
    "awq-gptq": Algorithm("both", scales=True, compensates=True),
    "smoothquant": Algorithm(
        "share large inputs with the weights, round both to 8 bits", scales=True, rounds_inputs=CodeType.INTEGER
    ),
    "gptq-fp8": Algorithm(
        "round inputs and weights to E4M3 floats, and make up for columns' errors",
        compensates=True,
        rounds_inputs=CodeType.E4M3,
    ),
}
DEFAULT_ALGORITHM = "awq-gptq"
