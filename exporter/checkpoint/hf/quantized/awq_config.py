"""quantization_config of AWQ checkpoints, and quant_config.json of older ones.

Source: AutoAWQ 0.2.9 (`models/_config.py`), transformers 5 (`AwqConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config_values import flag
from qwen_aot.exporter.checkpoint.hf.quantized.config_checks import (
    HARMLESS,
    bits_of,
    check_keys,
    group_size_of,
    names_of,
    part_of,
    word_of,
)
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import Scheme

SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}  # AutoAWQ's own file -> config.json
READ = frozenset(
    {
        *("quant_method", "method", "bits", "group_size", "zero_point", "version", "format", "checkpoint_format"),
        *("modules_to_not_convert", "backend"),
    }
)
_ACCEPTED: Mapping[str, tuple[object, ...]] = {
    "pack_dtype": ("int32", "torch.int32"),
    "rotation": (),
    "adapter": (),
    "dynamic": (),
}
_HARMLESS = HARMLESS | {"sym", "desc_act", "meta"}  # of GPTQ, whose class transformers' inherits
_VERSION = "gemm"
_BITS = (4,)


@dataclass(frozen=True, slots=True)
class AwqSettings:
    """What an AWQ configuration says of its tensors.

    Attributes:
        scheme: of all quantized modules; symmetric without `zero_point`.
        plain: names that quantized modules don't have.
    """

    scheme: Scheme
    plain: frozenset[str]

    def why_plain(self, module: str) -> str | None:
        """What says that a module isn't quantized, or None."""
        found = part_of(module, self.plain)
        return None if found is None else f"modules_to_not_convert has {found!r}"


def parse(raw: Mapping[str, Any]) -> AwqSettings:
    """Reads the configuration.

    Raises:
        CheckpointError: a key is missing, not known, or says what isn't supported (named).
    """
    check_keys(raw, read=READ, accepted=_ACCEPTED, harmless=_HARMLESS)
    for key in ("version", "format", "checkpoint_format"):
        version = word_of(raw, key, _VERSION)
        if version != _VERSION:
            raise CheckpointError(f"{key} is {version!r}; not supported; accepted: {_VERSION}")
    if word_of(raw, "backend") == "llm-awq":
        raise CheckpointError("backend is 'llm-awq', which packs in another way; not supported; accepted: autoawq")
    bits = bits_of(raw, "bits", _BITS)
    return AwqSettings(
        Scheme(bits, group_size_of(raw, "group_size", 128), not flag(raw, "zero_point", True)),
        names_of(raw, "modules_to_not_convert"),
    )
