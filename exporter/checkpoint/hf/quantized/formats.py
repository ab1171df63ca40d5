"""The registry of quantized formats: a row for each `quant_method`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from qwen_aot.exporter.checkpoint.hf.quantized import (
    awq,
    awq_config,
    compressed_tensors,
    compressed_tensors_config,
    gptq,
    gptq_config,
)
from qwen_aot.exporter.checkpoint.hf.quantized.linear import E4M3, INT8, QuantizedLinear, StoredLinear


class Settings(Protocol):
    """What a configuration says, parsed."""

    def why_plain(self, module: str) -> str | None:
        """What says that a module isn't quantized, or None."""


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Format(Generic[S]):
    """One way of storing quantized linears.

    Attributes:
        parts: last segments of its tensors' names.
        read: keys of its configuration that must be equal wherever they are said twice.
        parse: the configuration -> settings.
        open_linears: all linears, checked -> what gives their rows.
        synonyms: other names of keys in a file beside config.json.
        has_tables: the embedding may be quantized too.
        weight_dtypes: of codes that are called `weight`, as plain numbers are.
    """

    parts: Collection[str]
    read: Collection[str]
    parse: Callable[[Mapping[str, Any]], S]
    open_linears: Callable[[Sequence[StoredLinear], S], list[QuantizedLinear]]
    synonyms: Mapping[str, str] = field(default_factory=dict)
    has_tables: bool = False
    weight_dtypes: Collection[np.dtype[Any]] = ()


FORMATS: Mapping[str, Format[Any]] = {  # by `quant_method`
    "gptq": Format(gptq.PARTS, gptq_config.READ, gptq_config.parse, gptq.open_linears),
    "awq": Format(awq.PARTS, awq_config.READ, awq_config.parse, awq.open_linears, awq_config.SYNONYMS),
    "compressed-tensors": Format(
        compressed_tensors.PARTS,
        compressed_tensors_config.READ,
        compressed_tensors_config.parse,
        compressed_tensors.open_linears,
        has_tables=True,
        weight_dtypes=(INT8, E4M3),
    ),
}
