"""`plan`: which model fits which device, and how fast it could be at most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import print_json, show_logs, size, stdout
from qwen_aot.runtime.cli.options import CONTEXT, json_option
from qwen_aot.runtime.cli.tables import Cell, print_table, say

if TYPE_CHECKING:
    from qwen_aot.engines.planner.plans import Plan
    from qwen_aot.exporter.checkpoint.storage import Storage
    from qwen_aot.exporter.model.config import ModelConfig


_HEADINGS = "model", "precision", "context", "weights", "cache", "other*", "total", "fits", "longest", "batch", "tok/s"


_KERNELS = {"own": "own kernels", "onnxruntime": "ONNX Runtime's kernels"}


def _targets() -> str:
    from qwen_aot.engines.spec.targets import Target

    return f"{', '.join(Target)}.  [default: each device's]"


def _precisions() -> str:
    from qwen_aot.engines.spec.precisions import PRECISIONS

    return f"{', '.join(PRECISIONS)}; may be given again.  [default: the target's]"


def _kv_precisions() -> str:
    from qwen_aot.engines.spec.kv_precision import DEFAULT_KV_PRECISION, KV_PRECISIONS

    return f"{', '.join(KV_PRECISIONS)}: the KV cache.  [default: {DEFAULT_KV_PRECISION}]"


@click.command("plan", cls=VerbCommand, context_settings=CONTEXT)
@click.argument("models", nargs=-1, metavar="[CHECKPOINT|VARIANT|GENERATION]...")
@option("--device", "devices", multiple=True, help="One device; may be given again.  [default: all]", group="Where")
@option("--target", help=_targets, group="Where")
@option(
    "--precision",
    "precisions",
    multiple=True,
    help=_precisions,
    group="What",
)
@option("--context", type=int, help="Tokens a row can hold.  [default: the target's]", group="What")
@option("--batch", type=int, default=1, help="Rows that run together.", group="What")
@option(
    "--kv-precision",
    help=_kv_precisions,
    group="What",
)
@option(
    "--kernels",
    type=click.Choice(["own", "onnxruntime"]),
    default="own",
    help="Whose run it, of target cpu.  [default: own, which halve a quantized model's cache]",
    group="What",
)
@option("--speculate", type=int, metavar="K", help="Tokens that a step can check, as of build-engine.", group="What")
@json_option
def command(
    models: tuple[str, ...],
    devices: tuple[str, ...],
    target: str | None,
    precisions: tuple[str, ...],
    context: int | None,
    batch: int,
    kv_precision: str | None,
    kernels: str,
    speculate: int | None,
    as_json: bool,
) -> None:
    """Show which models fit which devices, and how fast at most.

    \b
    Examples:
      qwen-aot plan
      qwen-aot plan qwen1.5-7b --device orin-nano-8gb --precision int4

    Of a Hugging Face folder or a .gguf file only the configuration and headers are read. A generation (qwen, qwen-vl,
    qwen1.5, qwen2, qwen2.5, qwq, qwen3, qwen3-2507) stands for all of its variants with so much context; without a
    model, Qwen1.5's are planned; without --device, for every device. Nothing is built, and no GPU is needed. Weights
    and cache are exact, activations an estimate. The speed is what the memory's bandwidth allows with full contexts: no
    engine is faster.
    """
    show_logs()
    from qwen_aot.engines.planner.devices import DEVICES, find_device
    from qwen_aot.engines.planner.plans import plans
    from qwen_aot.engines.spec.kv_precision import DEFAULT_KV_PRECISION
    from qwen_aot.errors import BuildError

    try:
        keys = tuple(dict.fromkeys(map(find_device, devices))) or tuple(DEVICES)
        configs, storages = _models(models, context)
        found = list(
            plans(
                configs,
                keys,
                target=target,  # type: ignore[arg-type]  # BuildSpec takes its name
                precisions=dict.fromkeys(precisions) or (None,),  # type: ignore[arg-type]  # and theirs
                max_context=context,
                max_batch=batch,
                kv_precision=DEFAULT_KV_PRECISION if kv_precision is None else kv_precision,
                speculate=speculate,
                storages=storages,
                own_kernels=kernels == "own",
            )
        )
    except BuildError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        print_json({"devices": [_device_facts(key) for key in keys], "plans": [_facts(plan) for plan in found]})
        return
    for key in keys:
        _show(key, [plan for plan in found if plan.device == key])
    say(
        stdout(),
        "* activations, estimated. longest, batch: the most tokens and rows that fit with the rest as it is. tok/s: "
        "tokens a second of all rows together, with full contexts, at the memory's whole bandwidth: no engine is "
        "faster.",
    )


def _models(names: Iterable[str], context: int | None) -> tuple[list[tuple[str, ModelConfig]], dict[str, Storage]]:
    """Names and facts of what the user named, or of Qwen1.5's variants; and how checkpoints store their tensors.

    `context`: tokens that are asked for.
    """
    from qwen_aot.exporter.model.variants import find_generation
    from qwen_aot.runtime.cli.source import find_variant

    configs, storages = [], {}
    for name in dict.fromkeys(names or ("qwen1.5",)):
        if Path(name).exists():
            from qwen_aot.exporter.checkpoint.open import open_checkpoint
            from qwen_aot.exporter.checkpoint.storage import storage_of

            with open_checkpoint(name) as checkpoint:
                configs.append((checkpoint.name, checkpoint.config))
                storages[checkpoint.name] = storage_of(checkpoint)
        elif (generation := find_generation(name)) is not None:
            configs += [each for each in _with_context(generation.models, context) if each not in configs]
        elif (variant := find_variant(name)) not in configs:
            configs.append(variant)
    return configs, storages


def _with_context(models: Mapping[str, ModelConfig], context: int | None) -> list[tuple[str, ModelConfig]]:
    """Those whose context is long enough; where none is, the one with the longest, which says so."""
    if context is None:
        return list(models.items())
    longest = max(models.items(), key=lambda entry: entry[1].max_position_embeddings)
    return [entry for entry in models.items() if entry[1].max_position_embeddings >= context] or [longest]


def _device_facts(key: str) -> dict[str, Any]:
    from qwen_aot.engines.planner.devices import DEVICES

    device = DEVICES[key]
    return {
        "device": key,
        "name": device.name,
        "compute_capability": device.capability_name,
        "memory_bytes": device.memory_bytes,
        "reserved_bytes_assumed": device.reserved_bytes,
        "usable_bytes": device.usable_bytes,
        "bandwidth_bytes_per_second": device.bytes_per_second,
        "targets": list(device.targets),
    }


def _facts(plan: Plan) -> dict[str, Any]:
    needed = plan.footprint
    return {
        "model": plan.model,
        "device": plan.device,
        "target": plan.spec.target,
        "precision": plan.spec.precision,
        "kv_precision": plan.spec.kv_precision,
        "kernels": plan.kernels,
        "context": plan.context,
        "batch": plan.spec.max_batch,
        "prefill_chunk": plan.spec.prefill_chunk,
        "speculate": plan.spec.speculate,
        "weight_bytes": needed.weight_bytes,
        "cache_bytes": needed.cache_bytes,
        "activation_bytes_estimated": needed.activation_bytes_estimated,
        "total_bytes": needed.total_bytes,
        "fits": plan.fits,
        "missing_bytes": plan.missing_bytes,
        "refusal": plan.refusal,
        "remedy": plan.remedy,
        "longest_context": plan.longest_context,
        "largest_batch": plan.largest_batch,
        "decode_step_bytes": needed.step_bytes,
        "ceiling_tokens_per_second": plan.ceiling,
    }


def _show(key: str, found: Sequence[Plan]) -> None:
    """One table for a device, and below it what to do about what doesn't fit."""
    console = stdout()
    device, spec = _device_facts(key), found[0].spec
    kernels = f" by {_KERNELS[found[0].kernels]}" if found[0].kernels and not spec.facts.runs_on_gpu else ""
    by = f"target {spec.target}{kernels}"
    about = Text.assemble(
        (key, "bold"),
        f": {device['name']}, SM {device['compute_capability']}, {device['bandwidth_bytes_per_second'] / 1e9:g} GB/s, "
        f"{size(device['usable_bytes'])} usable of {size(device['memory_bytes'])}; {by}, batch "
        f"{spec.max_batch}; sizes in GB",
    )
    say(console, about)
    shown = [plan for plan in found if plan.refusal is None]
    if shown:
        console.print()
        print_table(console, _HEADINGS, map(_cells, shown), numbers=_HEADINGS[2:])
    notes = dict.fromkeys(filter(None, map(_note, found)))
    if notes:
        console.print()
    for note in notes:
        say(console, note)
    console.print()


def _cells(plan: Plan) -> tuple[Cell, ...]:
    needed = plan.footprint
    parts = (needed.weight_bytes, needed.cache_bytes, needed.activation_bytes_estimated, needed.total_bytes)
    return (
        plan.model,
        plan.spec.precision,
        str(plan.context),
        *map(_gigabytes, parts),
        Text("yes", style="green") if plan.fits else Text("no", style="red"),
        str(plan.longest_context or "-"),
        str(plan.largest_batch or "-"),
        "-" if plan.ceiling is None else f"{plan.ceiling:.1f}" if plan.ceiling < 100 else f"{plan.ceiling:.0f}",
    )


def _gigabytes(value: int) -> str:
    """Three figures, or three decimals of what is below 1 GB."""
    number = value / 1e9
    return f"{number:.{3 if number < 1 else 2 if number < 10 else 1 if number < 100 else 0}f}"


def _note(plan: Plan) -> str:
    if plan.refusal is not None:
        return f"refused: {plan.refusal}"
    lacking = [] if plan.fits else [f"lacks {size(plan.missing_bytes)}"]
    found = [*lacking, *filter(None, [plan.remedy])]
    return f"{plan.model} {plan.spec.precision}: {', '.join(found)}" if found else ""
