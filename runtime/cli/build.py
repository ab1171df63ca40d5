"""`build` and `build-engine`: a checkpoint in, a bundle out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from qwen_aot.runtime.bundle.files import PREPARED_NAME
from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY, PLUGIN_LIBRARY_VARIABLE
from qwen_aot.runtime.cli.build_prepared import compile_folder
from qwen_aot.runtime.cli.build_shown import show_estimate, show_report
from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import progress_on_stderr, show_logs
from qwen_aot.runtime.cli.options import CONTEXT, GivenPath, threads_option

_TENSORRT = "TensorRT"


def _either(kinds: Iterable[str]) -> str:
    *others, last = kinds
    return f"{', '.join(others)} or {last}" if others else str(last)


def _targets() -> str:
    from qwen_aot.engines.spec.build_spec import BuildSpec
    from qwen_aot.engines.spec.targets import Target

    return f"{_either(Target)}: where it runs.  [default: {BuildSpec().target}]"


def _precisions() -> str:
    """How each precision stores the weights, those together that do it alike."""
    from qwen_aot.engines.spec.precisions import PRECISIONS, QUANTIZED_PRECISIONS

    names: dict[str, list[str]] = {}
    for name, row in PRECISIONS.items():
        names.setdefault(row.summary, []).append(name)
    forms = "; ".join(f"{_either(found)}, {summary}" for summary, found in names.items())
    others = "; ".join(
        f"{name}, inputs of products too, by --algorithm {made.algorithm}"
        for name, made in QUANTIZED_PRECISIONS.items()
    )
    return f"The weights: {forms}; {others}.  [default: the target's]"


def _max_batch() -> str:
    from qwen_aot.engines.spec.build_spec import BuildSpec

    return f"Rows that run together.  [default: {BuildSpec().max_batch}]"


def _kv_precisions() -> str:
    from qwen_aot.engines.spec.kv_precision import DEFAULT_KV_PRECISION, KV_PRECISIONS

    return (
        f"{', '.join(KV_PRECISIONS)}: the KV cache; auto is the compute type; int8 is for cpu, and for tensorrt's "
        f"attention plugin.  [default: {DEFAULT_KV_PRECISION}]"
    )


@click.command("build", cls=VerbCommand, context_settings=CONTEXT)
@click.argument("checkpoint")
@option(
    "-o",
    "--output",
    "out",
    required=True,
    type=GivenPath(),
    help="The bundle's folder.",
    group="Main",
)
@option("--target", help=_targets, group="Main")
@option("--precision", help=_precisions, group="Main")
@option("--dry-run", is_flag=True, help="Show sizes, memory and time, and write nothing.", group="Main")
@option("--json", "as_json", is_flag=True, help="One JSON object on stdout.", group="Main")
@option(
    "--max-context",
    type=int,
    help="Tokens a row can hold.  [default: the model's; TensorRT: at most 4096]",
    group="Capacity",
)
@option("--max-batch", type=int, help=_max_batch, group="Capacity")
@option("--prefill-chunk", type=int, help="Prompt tokens in one step.  [default: the target's]", group="Capacity")
@option(
    "--speculate",
    type=int,
    metavar="K",
    help="Tokens that a step can check: up to K - 1 are drafted from the text itself, which makes answers that repeat "
    "parts of their prompt faster; 4 suits most CPUs.",
    group="Capacity",
)
@option(
    "--block-size",
    type=int,
    help="Weights that share a scale.  [default: the precision's measured best]",
    group="Quantization",
)
@option(
    "--symmetric/--asymmetric",
    default=None,
    help="Without or with zero points.  [default: symmetric]",
    group="Quantization",
)
@option(
    "--own-codes",
    is_flag=True,
    help="Keep the numbers of a .gguf file's codes, each in its own bits and blocks. A folder's codes are kept anyway.",
    group="Quantization",
)
@option(
    "--sensitive-bits",
    type=int,
    help="8 or 4: embedding, head and down projections.  [default: 8]",
    group="Quantization",
)
@option(
    "--algorithm",
    help="Quantize by what sample texts show, as `qwen-aot quantize` does: rtn, awq, gptq or awq-gptq.",
    group="Quantization",
)
@option(
    "--keep-quantized",
    type=GivenPath(),
    help="Where the folder that --algorithm makes stays.  [default: nowhere]",
    group="Quantization",
)
@option(
    "--fast-prefill",
    is_flag=True,
    help="Add an 8-bit form of the projections that long prompts run through about twice as fast (needs VNNI on x86).",
    group="Quantization",
)
@option("--kv-precision", help=_kv_precisions, group="Quantization")
@option(
    "--compute-capability",
    help="GPUs that the engine will run on: 8.6,8.9,12.0.  [default: RTX 30, 40 and 50]",
    group=_TENSORRT,
)
@option("--workspace-mib", type=click.IntRange(1), help="Most scratch memory that a kernel may take.", group=_TENSORRT)
@option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="0 builds fastest, 5 runs fastest.  [default: TensorRT's own]",
    group=_TENSORRT,
)
@option(
    "--timing-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A file of kernel timings, read and written (tensorrt).",
    group=_TENSORRT,
)
@option("--hardware-compatible", is_flag=True, help="Run on every GPU of Ampere or later (tensorrt).", group=_TENSORRT)
@option("--version-compatible", is_flag=True, help="Run on later versions too (tensorrt).", group=_TENSORRT)
@option("--strip-weights", is_flag=True, help="Leave the weights out, to be refitted (tensorrt).", group=_TENSORRT)
@option("--quantize-lm-head", "quantize_head", is_flag=True, help="Quantize the head too.", group=_TENSORRT)
@option(
    "--attention",
    help="plugin or native: the project's kernels or TensorRT's own.  [default: plugin with tensorrt]",
    group=_TENSORRT,
)
@option("--moe", help="plugin or native: the same of routed experts.  [default: plugin with tensorrt]", group=_TENSORRT)
@option(
    "--linear",
    help="plugin or native: the same of projections of int4 and int8.  [default: native]",
    group=_TENSORRT,
)
@option(
    "--plugin-library",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"{PLUGIN_LIBRARY}, as `python -m qwen_aot.plugins.library` writes it.  [default: ${PLUGIN_LIBRARY_VARIABLE}]",
    group=_TENSORRT,
)
@option(
    "--prepare",
    is_flag=True,
    help="All but the compiling, for a device that compiles: run build-engine there with the folder that this writes.",
    group=_TENSORRT,
)
@option("--random-weights", is_flag=True, help="For a variant's name: weights drawn from --seed.", group="Trial")
@option("--seed", type=click.IntRange(0), default=0, help="Of the random weights.", group="Trial")
@option(
    "--verify",
    "with_verify",
    is_flag=True,
    help="Compare with transformers before installing (cpu).",
    group="Trial",
)
@threads_option
def command(
    checkpoint: str,
    out: Path,
    dry_run: bool,
    as_json: bool,
    random_weights: bool,
    seed: int,
    with_verify: bool,
    algorithm: str | None,
    keep_quantized: Path | None,
    compute_capability: str | None,
    workspace_mib: int | None,
    optimization_level: int | None,
    timing_cache: Path | None,
    hardware_compatible: bool,
    version_compatible: bool,
    strip_weights: bool,
    quantize_head: bool,
    attention: Any,  # TensorRtOptions refuses what isn't one of its forms
    moe: Any,
    linear: Any,
    plugin_library: Path | None,
    prepare: bool,
    threads: int | None,
    **request: Any,
) -> None:
    """Build a bundle from a checkpoint.

    \b
    Examples:
      build-engine ./Qwen1.5-0.5B-Chat -o ./bundle
      build-engine qwen1.5-7b --random-weights -o ./trial --dry-run \\
        --target tensorrt-rtx --compute-capability 8.9

    CHECKPOINT is a Hugging Face folder, a .gguf file, a variant's name with --random-weights, or a folder that
    --prepare wrote. What stands at the output stays until the new bundle is whole; a failed or interrupted build
    changes nothing.
    """
    if (Path(checkpoint) / PREPARED_NAME).is_file():
        compile_folder(click.get_current_context(), Path(checkpoint), out, dry_run=dry_run, as_json=as_json)
        return
    from qwen_aot.engines.build_quantized import settled_algorithm
    from qwen_aot.engines.spec.build_spec import BuildSpec
    from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
    from qwen_aot.errors import BuildError

    show_logs()
    try:
        request["precision"], algorithm = settled_algorithm(request["precision"], algorithm)
    except BuildError as error:
        raise click.UsageError(str(error)) from None
    if with_verify and algorithm is not None:
        raise click.UsageError("--verify compares with the checkpoint's own numbers; use qwen-aot compare afterwards")
    if keep_quantized is not None and algorithm is None:
        raise click.UsageError("--keep-quantized goes with --algorithm")
    if prepare and (with_verify or algorithm is not None):
        raise click.UsageError(
            "--prepare goes without --verify and --algorithm: quantize first (`qwen-aot quantize`), and prepare a "
            "build of what it writes"
        )
    if dry_run and algorithm is not None:
        raise click.UsageError(
            f"--dry-run doesn't plan what algorithm {algorithm} makes; plan the precision of its codes (int4, int8) "
            "without it: the bundle is about as large"
        )
    try:
        options = TensorRtOptions(
            compute_capabilities=tuple(compute_capability.split(",")) if compute_capability is not None else (),
            workspace_bytes=workspace_mib << 20 if workspace_mib is not None else None,
            optimization_level=optimization_level,
            timing_cache=timing_cache,
            hardware_compatible=hardware_compatible,
            version_compatible=version_compatible,
            strip_weights=strip_weights,
            quantize_head=quantize_head,
            attention=attention,
            moe=moe,
            linear=linear,
            plugin_library=plugin_library,
        )
        spec = BuildSpec(tensorrt=options, **{name: value for name, value in request.items() if value is not None})
        if prepare:
            from qwen_aot.engines.prepared_folder import require_compiled

            require_compiled(spec)
        if algorithm is not None:
            from qwen_aot.engines.build_quantized import quantize_spec_for

            quantize_spec_for(spec, algorithm)
    except BuildError as error:
        raise click.UsageError(str(error)) from None

    from qwen_aot.engines.build import build_bundle, plan_build
    from qwen_aot.runtime.cli.source import open_source
    from qwen_aot.runtime.cli.verify import verifier_for

    with (
        open_source(checkpoint, random_weights=random_weights, seed=seed) as source,
        progress_on_stderr() as show,
    ):
        if prepare:
            from qwen_aot.engines.prepare import plan_prepared, prepare_build

            if dry_run:
                plan = plan_prepared(source, spec, out, on_progress=show, threads=threads)
            else:
                report = prepare_build(source, spec, out, on_progress=show, threads=threads)
        elif dry_run:
            plan = plan_build(source, spec, out, on_progress=show, threads=threads)
        elif algorithm is not None:
            from qwen_aot.engines.build_quantized import build_quantized

            report = build_quantized(
                source, algorithm, spec, out, keep=keep_quantized, on_progress=show, threads=threads
            )
        else:
            verifier = verifier_for(source) if with_verify else None
            report = build_bundle(source, spec, out, on_progress=show, verifier=verifier, threads=threads)
    if dry_run:
        show_estimate(plan.estimate, plan.warnings, out, as_json=as_json)
    else:
        show_report(report, "prepared" if prepare else "built", as_json=as_json)
