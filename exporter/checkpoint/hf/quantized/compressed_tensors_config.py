"""quantization_config of compressed-tensors checkpoints: `pack-quantized`, `int-quantized`, `float-quantized`.

The last two may say that inputs are rounded; `float-quantized` is read with such alone.

Source: compressed-tensors 0.20.1 `quantization/quant_config.py`, `quant_scheme.py` and `quant_args.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config_values import flag
from qwen_aot.exporter.checkpoint.hf.quantized.config_checks import (
    BITS,
    bits_of,
    check_keys,
    group_size_of,
    names_of,
    object_of,
    shown,
    word_of,
)
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import WHOLE_ROW, Scheme, distinct

READ = frozenset({"quant_method", "format", "config_groups", "ignore", "sparsity_config"})
_ACCEPTED: Mapping[str, tuple[object, ...]] = {
    "quantization_status": ("compressed", "frozen"),
    "kv_cache_scheme": (),
    "transform_config": (),
    "moe_sparsity_config": (),
}
_HARMLESS = frozenset(
    {"global_compression_ratio", "version", "run_compressed", "dequantize", "use_optimized_inference"}
)
PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
_GROUP_READ = {
    PACKED: ("targets", "weights"),
    INTEGERS: ("targets", "weights", "input_activations"),
    FLOATS: ("targets", "weights", "input_activations"),
}
_TYPE = {PACKED: "int", INTEGERS: "int", FLOATS: "float"}
_BITS_OF = {PACKED: BITS, INTEGERS: (8,), FLOATS: (8,)}
_GROUP_ACCEPTED: Mapping[str, tuple[object, ...]] = {"input_activations": (), "output_activations": ()}
_WEIGHTS_READ = frozenset({"type", "num_bits", "symmetric", "strategy", "group_size", "actorder"})
_WEIGHTS_ACCEPTED: Mapping[str, tuple[object, ...]] = {
    "dynamic": (),
    "block_structure": (),
    "scale_dtype": ("torch.float16", "torch.bfloat16", "torch.float32", "float16", "bfloat16", "float32"),
    "zp_dtype": ("torch.int8", "int8", "torch.float8_e4m3fn", "float8_e4m3fn"),
}
_WEIGHTS_HARMLESS = frozenset({"observer", "observer_kwargs"})
_INPUTS_ACCEPTED: Mapping[str, tuple[object, ...]] = {
    "num_bits": (8,),
    "strategy": ("tensor",),
    "symmetric": (True,),
    "scale_dtype": _WEIGHTS_ACCEPTED["scale_dtype"],
    "zp_dtype": _WEIGHTS_ACCEPTED["zp_dtype"],
}
# Old releases: columns in any group, with weight_g_idx; else only the order in which they were rounded.
_ACT_ORDERS = {"group": True, "dynamic": True, "weight": False, "static": False}


@dataclass(frozen=True, slots=True)
class LinearScheme:
    """One of the configuration's groups.

    Attributes:
        scheme: of its weights.
        has_act_order: their columns may be in any group.
        rounds_inputs: what they multiply is rounded to codes of their type by a scale of the whole input.
        has_one_scale: all rows of a weight have the same.
    """

    scheme: Scheme
    has_act_order: bool
    rounds_inputs: bool
    has_one_scale: bool = False

    def __str__(self) -> str:
        scales = "one scale" if self.has_one_scale else str(self.scheme)
        return f"{scales}{', with input_scale' if self.rounds_inputs else ''}"


@dataclass(frozen=True, slots=True)
class CompressedTensorsSettings:
    """What a compressed-tensors configuration says of its tensors.

    Attributes:
        format: PACKED, INTEGERS or FLOATS, of all weights.
        schemes: of all groups. Which modules are of which is told by the tensors.
        plain: `ignore`.
    """

    format: str
    schemes: tuple[LinearScheme, ...]
    plain: frozenset[str]

    def why_plain(self, module: str) -> str | None:
        """What says that a module isn't quantized, or None."""
        return f"ignore has {module!r}" if module in self.plain else None


def parse(raw: Mapping[str, Any]) -> CompressedTensorsSettings:
    """Reads the configuration.

    Raises:
        CheckpointError: a key is missing, not known, or says what isn't supported (named).
    """
    check_keys(raw, read=READ, accepted=_ACCEPTED, harmless=_HARMLESS)
    found = word_of(raw, "format", "dense")
    if found not in _TYPE:
        raise CheckpointError(f"format is {raw.get('format')!r}; not supported; accepted: {', '.join(_TYPE)}")
    if word_of(object_of(raw, "sparsity_config"), "format", "dense") != "dense":
        raise CheckpointError("sparsity_config says that weights are sparse; not supported; accepted: dense ones")
    groups = object_of(raw, "config_groups")
    if not groups:
        raise CheckpointError("config_groups is missing; accepted: an object with `weights` for each group")
    return CompressedTensorsSettings(
        found,
        distinct(_group(groups, name, found) for name in groups),
        names_of(raw, "ignore"),
    )


def _group(groups: Mapping[str, Any], name: str, format_name: str) -> LinearScheme:
    try:
        group = object_of(groups, name)
        check_keys(group, read=_GROUP_READ[format_name], accepted={**_GROUP_ACCEPTED, "format": (format_name,)})
        rounds_inputs = _rounds_inputs(group, _TYPE[format_name])
        if format_name == FLOATS and not rounds_inputs:
            raise CheckpointError(
                "input_activations is null: weights of float8 alone; not supported; accepted: inputs that are rounded "
                "too, by one input_scale a linear"
            )
        return _linear(object_of(group, "weights"), rounds_inputs, format_name)
    except CheckpointError as error:
        raise CheckpointError(f"config_groups, {shown(name)}: {error}") from error


def _rounds_inputs(group: Mapping[str, Any], type_name: str) -> bool:
    raw = object_of(group, "input_activations")
    if not raw:
        return False
    try:
        if raw.get("dynamic"):
            raise CheckpointError(
                f"dynamic is {shown(raw['dynamic'])}: each step would find its own scales; not supported; accepted: "
                "false, with one input_scale a linear"
            )
        if raw.get("symmetric") is False:
            raise CheckpointError("symmetric is false; not supported; accepted: true")
        _check_type(raw, type_name)
        check_keys(raw, read=("dynamic", "type"), accepted=_INPUTS_ACCEPTED, harmless=_WEIGHTS_HARMLESS)
        if raw.get("num_bits") is None or word_of(raw, "strategy") is None:
            raise CheckpointError("num_bits or strategy is missing; accepted: 8, tensor")
    except CheckpointError as error:
        raise CheckpointError(f"input_activations: {error}") from error
    return True


def _check_type(raw: Mapping[str, Any], accepted: str) -> None:
    """What codes are; compressed-tensors takes them for integers where nothing is said."""
    found = word_of(raw, "type", "int")
    if found != accepted:
        raise CheckpointError(f'type is "{found}"; not supported; accepted: "{accepted}"')


def _linear(raw: Mapping[str, Any], rounds_inputs: bool, format_name: str) -> LinearScheme:
    _check_type(raw, _TYPE[format_name])
    check_keys(raw, read=_WEIGHTS_READ, accepted=_WEIGHTS_ACCEPTED, harmless=_WEIGHTS_HARMLESS)
    bits = bits_of(raw, "num_bits", _BITS_OF[format_name])
    strategy = word_of(raw, "strategy")
    if format_name == FLOATS:
        return _floats(raw, bits, strategy, rounds_inputs)
    group_size = None if raw.get("group_size") is None else group_size_of(raw, "group_size", WHOLE_ROW)
    if strategy is None and group_size is not None:
        strategy = "channel" if group_size == WHOLE_ROW else "group"
    if strategy == "channel" and group_size in (None, WHOLE_ROW):
        group_size = WHOLE_ROW
    elif strategy != "group" or group_size is None or group_size == WHOLE_ROW:
        raise CheckpointError(
            f"strategy is {strategy!r} and group_size {group_size}; not supported; accepted: group with a group_size, "
            "or channel without"
        )
    order = raw.get("actorder")
    if isinstance(order, bool) or order is None:
        has_act_order = bool(order)
    elif isinstance(order, str) and order.lower() in _ACT_ORDERS:
        has_act_order = _ACT_ORDERS[order.lower()]
    else:
        raise CheckpointError(f"actorder is {shown(order)}; not supported; accepted: {', '.join(_ACT_ORDERS)}, null")
    if has_act_order and format_name == INTEGERS:
        raise CheckpointError(f"actorder is {shown(order)}; {INTEGERS} has no weight_g_idx; accepted: weight, null")
    return LinearScheme(Scheme(bits, group_size, flag(raw, "symmetric", True)), has_act_order, rounds_inputs)


def _floats(raw: Mapping[str, Any], bits: int, strategy: str | None, rounds_inputs: bool) -> LinearScheme:
    """Floats have a scale a row or one for all; they have their own zero, and columns in their order."""
    for key in ("group_size", "actorder"):
        if raw.get(key) not in (None, False):
            raise CheckpointError(f"{key} is {shown(raw[key])}; not supported with {FLOATS}; accepted: null")
    if not flag(raw, "symmetric", True):
        raise CheckpointError(f"symmetric is false; not supported with {FLOATS}; accepted: true")
    if strategy not in ("channel", "tensor"):
        raise CheckpointError(f"strategy is {strategy!r}; not supported with {FLOATS}; accepted: channel, tensor")
    return LinearScheme(Scheme(bits, WHOLE_ROW, True), False, rounds_inputs, strategy == "tensor")
