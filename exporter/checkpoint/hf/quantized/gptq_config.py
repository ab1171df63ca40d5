"""quantization_config of GPTQ checkpoints, and quantize_config.json of older ones.

Source: AutoGPTQ 0.7.1 (`modeling/_base.py`), transformers 5 (`GPTQConfig`), GPTQModel 7.7 (`quantization/config.py`).
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
    end_of,
    group_size_of,
    names_of,
    object_of,
    part_of,
    shown,
    word_of,
)
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import Scheme, distinct

READ = frozenset(
    {
        *("quant_method", "method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "meta"),
        *("dynamic", "modules_in_block_to_quantize", "modules_to_not_convert"),
    }
)
_ACCEPTED: Mapping[str, tuple[object, ...]] = {
    "pack_dtype": ("int32", "torch.int32"),
    "is_marlin_format": (),
    "rotation": (),  # of activations, while it runs
    "adapter": (),
    "activation": (),
    "data_type": ("int",),
    "act_bits": (16, 32),
}
_FORMATS = ("gptq", "gptq_v2")
_DYNAMIC_READ = ("bits", "group_size", "sym", "desc_act")
_BORROWING = "gptqmodel"  # subtracts 1 from the zeros of a whole word when it saves v1 (`convert_gptq_v2_to_v1_format`)


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """What a GPTQ configuration says of its tensors.

    Attributes:
        schemes: the default's first, then those of `dynamic`.
        is_v2: stored zeros are the zeros; else zeros less 1.
        borrows: a v1 zero of 0 took 1 from the field above it when it was stored.
        has_act_order: columns may be in any group; None: not said.
        quantized: names in a layer, of which a quantized module has one at its end; empty: not said.
        plain: names that quantized modules don't have.
    """

    schemes: tuple[Scheme, ...]
    is_v2: bool
    borrows: bool
    has_act_order: bool | None
    quantized: frozenset[str]
    plain: frozenset[str]

    @property
    def is_symmetric(self) -> bool:
        """Whether all zero points are the middle: one answer for all modules."""
        return self.schemes[0].is_symmetric

    def why_plain(self, module: str) -> str | None:
        """What says that a module isn't quantized, or None."""
        if self.quantized and end_of(module, self.quantized) is None:
            return "modules_in_block_to_quantize lacks it"
        found = part_of(module, self.plain)
        return None if found is None else f"modules_to_not_convert has {found!r}"


def parse(raw: Mapping[str, Any]) -> GptqSettings:
    """Reads the configuration.

    Raises:
        CheckpointError: a key is missing, not known, or says what isn't supported (named).
    """
    check_keys(raw, read=READ, accepted=_ACCEPTED, harmless=HARMLESS)
    default = Scheme(bits_of(raw, "bits"), group_size_of(raw, "group_size", 128), flag(raw, "sym", True))
    return GptqSettings(
        schemes=distinct((default, *_dynamic(raw, default))),
        is_v2=_format(raw) == "gptq_v2",
        borrows=_quantized_by(raw, _BORROWING),
        has_act_order=None if raw.get("desc_act") is None else flag(raw, "desc_act", False),
        quantized=_quantized(raw),
        plain=names_of(raw, "modules_to_not_convert"),
    )


def _format(raw: Mapping[str, Any]) -> str:
    said = {key: value for key in ("checkpoint_format", "format") if (value := word_of(raw, key)) is not None}
    for key, value in said.items():
        if value not in _FORMATS:
            raise CheckpointError(f"{key} is {value!r}; not supported; accepted: {', '.join(_FORMATS)}")
    if len(set(said.values())) > 1:
        raise CheckpointError(
            f"checkpoint_format is {said['checkpoint_format']!r} and format {said['format']!r}; which?"
        )
    return next(iter(said.values()), "gptq")


def _quantized_by(raw: Mapping[str, Any], tool: str) -> bool:
    """Whether meta.quantizer names a tool: `tool:version`, or a list of such (transformers names itself first)."""
    said = object_of(raw, "meta").get("quantizer")
    names = said if isinstance(said, list) else [said]
    return any(isinstance(name, str) and name.lower().partition(":")[0] == tool for name in names)


def _dynamic(raw: Mapping[str, Any], default: Scheme) -> list[Scheme]:
    """Schemes that GPTQModel gave modules whose names match a pattern; `-:` and a pattern: not quantized at all."""
    schemes = []
    for pattern, overrides in object_of(raw, "dynamic").items():
        if pattern.startswith("-") or overrides is None:
            continue
        if not isinstance(overrides, dict):
            raise CheckpointError(f"dynamic has {shown(overrides)} for {shown(pattern)}; accepted: an object")
        try:
            check_keys(overrides, read=_DYNAMIC_READ, accepted={}, harmless=HARMLESS)
            bits = default.bits if overrides.get("bits") is None else bits_of(overrides, "bits")
            if flag(overrides, "sym", default.is_symmetric) != default.is_symmetric:
                raise CheckpointError(f"sym is another than the model's; accepted: {default.is_symmetric}")
            group_size = default.group_size
            if overrides.get("group_size") is not None:
                group_size = group_size_of(overrides, "group_size", group_size)
        except CheckpointError as error:
            raise CheckpointError(f"dynamic, of {shown(pattern)}: {error}") from error
        schemes.append(Scheme(bits, group_size, default.is_symmetric))
    return schemes


def _quantized(raw: Mapping[str, Any]) -> frozenset[str]:
    said = raw.get("modules_in_block_to_quantize")
    if said is None:
        return frozenset()
    groups = said if isinstance(said, list) else [said]
    names = [name for group in groups for name in (group if isinstance(group, list) else [group])]
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"modules_in_block_to_quantize is {shown(said)}; accepted: a list of lists of names")
    return frozenset(names)
