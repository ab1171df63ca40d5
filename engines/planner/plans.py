"""What fits where: the memory and the speed limit of a model on a device, before anything is built."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from qwen_aot.engines.planner.devices import DEVICES, Device
from qwen_aot.engines.planner.footprint import Footprint, footprint
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.flavours import capability
from qwen_aot.engines.spec.kv_precision import DEFAULT_KV_PRECISION
from qwen_aot.engines.spec.own_codes import NoProductsError, settled
from qwen_aot.engines.spec.precisions import Precision, combinations
from qwen_aot.engines.spec.targets import Target
from qwen_aot.errors import BuildError, ExportError
from qwen_aot.exporter.checkpoint.storage import Storage
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.position_tables import position_tables
from qwen_aot.runtime.bundle.manifest import MAX_COUNT


@dataclass(frozen=True, slots=True)
class Plan:
    """One model at one precision on one device.

    Attributes:
        model: what it is called.
        device: a key of `engines.planner.devices.DEVICES`.
        context: tokens a row can hold.
        footprint: bytes at that context and batch.
        refusal: why this can't run there whatever its size; None: it can. Then the rest is as if nothing fitted.
        longest_context: tokens that fit at this batch; 0: not one.
        largest_batch: rows that fit at this context; 0: not one.
        kernels: whose it counts with, "own" or "onnxruntime"; None: they are compiled into the engine.
        ceiling: tokens a second, of all rows together, at which decoding would use the whole bandwidth. No engine is
            faster with full contexts. None: it doesn't fit.
        remedy: what would fit, or by how much the smallest form doesn't; empty where this fits.
    """

    model: str
    device: str
    spec: BuildSpec
    context: int
    footprint: Footprint
    refusal: str | None
    longest_context: int
    largest_batch: int
    ceiling: float | None
    remedy: str
    kernels: str | None

    @property
    def fits(self) -> bool:
        """Whether it runs there."""
        return self.ceiling is not None

    @property
    def missing_bytes(self) -> int:
        """Memory that the device lacks for it."""
        return max(0, self.footprint.total_bytes - DEVICES[self.device].usable_bytes)


def plan(
    model: str,
    config: ModelConfig,
    spec: BuildSpec,
    device: str,
    storage: Storage | None = None,
    *,
    own_kernels: bool = True,
) -> Plan:
    """Plans one combination.

    Args:
        model: what to call it.
        config: its facts.
        spec: target, precision, context and batch; settled by the storage.
        device: a key of DEVICES.
        storage: of a checkpoint; None: of a model without one.
        own_kernels: see `footprint`.

    Raises:
        BuildError: the context is beyond the model's.
    """
    facts = DEVICES[device]
    context = spec.context_for(config.max_position_embeddings)
    needed = footprint(config, spec, storage, own_kernels=own_kernels)
    refusal = refusal_of(config, spec, facts)
    longest = largest = 0
    ceiling, remedy = None, ""
    if refusal is None:
        longest = longest_context(config, spec, facts.usable_bytes, storage, own_kernels=own_kernels)
        largest = largest_batch(config, spec, facts.usable_bytes, storage, own_kernels=own_kernels)
        if needed.total_bytes <= facts.usable_bytes:
            ceiling = spec.max_batch * facts.bytes_per_second / needed.step_bytes
        else:
            remedy = _remedy(config, spec, facts, longest, largest, storage, own_kernels)
    kernels = None if spec.facts.compiles else "onnxruntime"
    if own_kernels and spec.own_kernels_cache_type is not None:
        kernels = "own"
    return Plan(model, device, spec, context, needed, refusal, longest, largest, ceiling, remedy, kernels)


def plans(
    models: Iterable[tuple[str, ModelConfig]],
    devices: Iterable[str],
    *,
    target: Target | None = None,
    precisions: Iterable[Precision | None] = (None,),
    max_context: int | None = None,
    max_batch: int = 1,
    kv_precision: str = DEFAULT_KV_PRECISION,
    speculate: int | None = None,
    storages: Mapping[str, Storage] | None = None,
    own_kernels: bool = True,
) -> Iterator[Plan]:
    """Plans every model at every precision on every device.

    Args:
        models: names and facts.
        devices: keys of DEVICES.
        target: None: the first of each device's.
        precisions: None stands for the target's default.
        max_context: tokens; None: the target's default.
        max_batch: rows.
        kv_precision: of the cache (`engines.spec.kv_precision.KV_PRECISIONS`).
        speculate: tokens of a row that a step checks; None: one.
        storages: of the models that have a checkpoint, by name.
        own_kernels: see `footprint`.

    Raises:
        BuildError: a combination that doesn't exist, a context beyond a model's, or a count below 1.
    """
    models, precisions = tuple(models), tuple(precisions)
    for device in devices:
        specs = [
            BuildSpec(
                target=target or DEVICES[device].targets[0],
                precision=precision,  # type: ignore[arg-type]  # BuildSpec takes None for the target's default
                max_context=max_context,
                max_batch=max_batch,
                kv_precision=kv_precision,
                speculate=speculate,
            )
            for precision in precisions
        ]
        for model, config in models:
            storage = (storages or {}).get(model)
            for spec in specs:
                yield _settled_plan(model, config, spec, device, storage, own_kernels)


def _settled_plan(
    model: str, config: ModelConfig, spec: BuildSpec, device: str, storage: Storage | None, own_kernels: bool
) -> Plan:
    """The plan of what a build would make of the spec; a conflict with the checkpoint is a refusal."""
    if storage is None:
        return plan(model, config, spec, device, own_kernels=own_kernels)
    try:
        return plan(model, config, settled(spec, storage), device, storage, own_kernels=own_kernels)
    except (BuildError, ExportError) as error:
        as_if = plan(model, config, spec, device, own_kernels=own_kernels)
        return dataclasses.replace(
            as_if, refusal=str(error), longest_context=0, largest_batch=0, ceiling=None, remedy=""
        )


def refusal_of(config: ModelConfig, spec: BuildSpec, device: Device) -> str | None:
    """Why a model's target or precision can't run on a device; None where it can."""
    if spec.target not in device.targets:
        accepted = ", ".join(device.targets)
        if not spec.facts.runs_on_gpu:
            return (
                f"target {spec.target} runs in the host's memory, which a card doesn't share; targets here: {accepted}"
            )
        return f"target {spec.target} doesn't run on SM {device.capability_name}; targets here: {accepted}"
    row = spec.precision.row
    lowest = row.lowest_capability
    instead = "" if row.instead is None else f"; {row.instead} is as small"
    if device.capability < capability(lowest):
        return f"{spec.precision} needs SM {lowest} or later, and this is SM {device.capability_name}{instead}"
    return refusal_of_model(config, spec)


def refusal_of_model(config: ModelConfig, spec: BuildSpec) -> str | None:
    """Why a target or precision has not all of what a model is made of, on any device; None where it has."""
    if config.vision is not None and spec.facts.vision_file is None:
        return f"target {spec.target} builds no model that takes images"
    return _refusal_of_experts(config, spec) or _refusal_of_rotary_tables(config, spec)


def _refusal_of_rotary_tables(config: ModelConfig, spec: BuildSpec) -> str | None:
    context = spec.context_for(config.max_position_embeddings)
    if spec.facts.has_rotary_tables or position_tables(config, context).rotary_tables == 1:
        return None
    return (
        f"a context beyond the trained length of {config.dynamic_ntk_length} tokens (use_dynamic_ntk) doesn't exist "
        f"for {spec.target}; accepted: --max-context up to {config.dynamic_ntk_length}"
    )


def _refusal_of_experts(config: ModelConfig, spec: BuildSpec) -> str | None:
    row = spec.precision.row
    instead = "" if row.instead is None else f"; {row.instead} is as small"
    if config.moe is None or not row.is_quantized or spec.facts.quantized_experts == "yes":
        return None
    if spec.own_codes and spec.facts.quantized_experts == "plugin":
        return None  # `footprint` refuses experts that are codes
    if spec.facts.quantized_experts == "no":
        return f"quantized experts don't exist for {spec.target} ({spec.precision} asked for); fp16 does"
    if spec.moe == "native":
        return (
            f"quantized experts don't exist for {spec.target} without a plugin ({spec.precision} asked for); fp16 does"
        )
    return None if row.has_plugin_experts else f"{spec.precision} experts don't exist in the plugin{instead}"


def longest_context(
    config: ModelConfig,
    spec: BuildSpec,
    usable_bytes: int,
    storage: Storage | None = None,
    *,
    own_kernels: bool = True,
) -> int:
    """Tokens, at most the model's, of the longest context that fits in `usable_bytes` at the spec's batch; or 0."""

    def fits(context: int) -> bool:
        other = dataclasses.replace(spec, max_context=context)
        return footprint(config, other, storage, own_kernels=own_kernels).total_bytes <= usable_bytes

    return _largest(fits, config.max_position_embeddings)


def largest_batch(
    config: ModelConfig,
    spec: BuildSpec,
    usable_bytes: int,
    storage: Storage | None = None,
    *,
    own_kernels: bool = True,
) -> int:
    """Rows of the largest batch that fits in `usable_bytes` at the spec's context; or 0."""

    def fits(batch: int) -> bool:
        other = dataclasses.replace(spec, max_batch=batch)
        return footprint(config, other, storage, own_kernels=own_kernels).total_bytes <= usable_bytes

    bound = 1
    while bound < MAX_COUNT and fits(bound):
        bound = min(2 * bound, MAX_COUNT)
    return _largest(fits, bound)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest of 1 … limit that fits, where each that fits makes all below it fit; 0: none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _remedy(
    config: ModelConfig,
    spec: BuildSpec,
    device: Device,
    longest: int,
    largest: int,
    storage: Storage | None,
    own_kernels: bool,
) -> str:
    """What would fit in the place of `spec`: less context, fewer rows, a smaller precision; or that nothing does."""
    usable = device.usable_bytes
    shorter = [f"a context of {longest}"] if longest else []
    shorter += [f"a batch of {largest}"] if largest else []
    found = [f"{spec.precision} fits with {' or '.join(shorter)}"] if shorter else []
    smaller = _smaller(config, spec, device, storage)
    for other in smaller:
        if footprint(config, other, storage, own_kernels=own_kernels).total_bytes <= usable:
            return "; ".join([*found, f"{other.precision} fits"])
    if found:
        return found[0]
    least = (spec, *smaller)[-1]
    if context := longest_context(config, least, usable, storage, own_kernels=own_kernels):
        return f"{least.precision} fits with a context of {context}"
    if batch := largest_batch(config, least, usable, storage, own_kernels=own_kernels):
        return f"{least.precision} fits with a batch of {batch}"
    one_row = dataclasses.replace(least, max_batch=1)
    if context := longest_context(config, one_row, usable, storage, own_kernels=own_kernels):
        return f"{least.precision} fits with a batch of 1 and a context of {context}"
    one_token = footprint(config, dataclasses.replace(one_row, max_context=1), storage, own_kernels=own_kernels)
    missing = one_token.total_bytes - usable
    return f"nothing fits: even {least.precision} with one token in one row lacks {missing / 1e9:.3g} GB"


def _kv_of(spec: BuildSpec) -> str:
    """The cache's precision that goes with any other of the weights."""
    return "int8" if spec.cache_type == "INT8" else "auto"


def _smaller(config: ModelConfig, spec: BuildSpec, device: Device, storage: Storage | None) -> list[BuildSpec]:
    """The spec at each precision with fewer bytes that runs on the device, in its default form, the largest first.

    Of a checkpoint that fixes its precision there are its own codes alone.
    """

    def size(other: BuildSpec) -> int:
        return footprint(config, other, storage).weight_bytes

    def default(precision: Precision | None) -> BuildSpec:
        return BuildSpec(
            target=spec.target,
            precision=precision,  # type: ignore[arg-type]  # BuildSpec takes None for the default
            max_context=spec.max_context,
            max_batch=spec.max_batch,
            prefill_chunk=spec.prefill_chunk,
            speculate=spec.speculate,
            kv_precision=_kv_of(spec),
        )

    others: list[BuildSpec] = []
    if storage is not None and any(storage.fixed):
        with contextlib.suppress(NoProductsError):
            others = [] if spec.own_codes else [settled(default(None), storage)]
    else:
        others = [default(other.precision) for other in combinations() if other.target == spec.target]
    kept = [other for other in others if size(other) < size(spec) and refusal_of(config, other, device) is None]
    return sorted(kept, key=size, reverse=True)
