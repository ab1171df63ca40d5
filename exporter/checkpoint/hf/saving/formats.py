"""The registry of formats that quantized checkpoints are written in: a row for each `quant_method`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.encoding import EncodedRows
from qwen_aot.exporter.checkpoint.hf.saving import awq, compressed_tensors, gptq
from qwen_aot.exporter.checkpoint.hf.saving.matrix import Matrix


@dataclass(frozen=True, slots=True)
class SavedFormat:
    """One way of writing matrices as codes.

    Attributes:
        check: raises BuildError where matrices can't be stored in one folder.
        pack: all rows of one -> its tensors by the last segment of their names, behind the module's.
        configuration: matrices, plain linears' modules, and the quantizer's name -> quantization_config.
    """

    check: Callable[[Sequence[Matrix]], None]
    pack: Callable[[EncodedRows], Mapping[str, NDArray[Any]]]
    configuration: Callable[[Sequence[Matrix], Sequence[str], str], Mapping[str, Any]]


SAVED_FORMATS: Mapping[str, SavedFormat] = {  # by `quant_method`
    "gptq": SavedFormat(gptq.check, gptq.pack_matrix, gptq.configuration),
    "awq": SavedFormat(awq.check, awq.pack_matrix, awq.configuration),
    "compressed-tensors": SavedFormat(
        compressed_tensors.check, compressed_tensors.pack_matrix, compressed_tensors.configuration
    ),
}


def saved_format(name: str) -> SavedFormat:
    """The row of a name.

    Raises:
        BuildError: there is none.
    """
    if name not in SAVED_FORMATS:
        raise BuildError(f"format {name!r} can't be written; accepted: {', '.join(SAVED_FORMATS)}")
    return SAVED_FORMATS[name]
