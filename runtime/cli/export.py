"""`export`: a model's ONNX graph with KV-cache inputs and outputs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import duration, print_json, progress_on_stderr, show_logs, size, stdout
from qwen_aot.runtime.cli.options import CONTEXT, GivenPath, json_option, threads_option
from qwen_aot.runtime.cli.tables import say


def _precisions() -> str:
    """Which precisions the lowerings have, those together that have the same."""
    from qwen_aot.engines.spec.lowerings import LOWERINGS

    sharing: dict[str, list[str]] = {}
    for name, facts in LOWERINGS.items():
        sharing.setdefault(", ".join(facts.precisions), []).append(name)
    forms = "; ".join(f"{', '.join(names)}: {precisions}" for precisions, names in sharing.items())
    return f"{forms}.  [default: {next(iter(LOWERINGS['standard'].precisions))}]"


@click.command("export", cls=VerbCommand, context_settings=CONTEXT)
@click.argument("checkpoint", metavar="CHECKPOINT|VARIANT")
@option("-o", "--output", "out", required=True, type=GivenPath(), help="Folder for the graph.", group="Main")
@option(
    "--lowering",
    type=click.Choice(["standard", "plugin", "ort"]),
    default="standard",
    help="Standard ONNX (opset 24), the same around TensorRT plugins, or ONNX Runtime's fastest ops.",
    group="Main",
)
@option(
    "--precision",
    help=_precisions,
    group="Main",
)
@option("--max-context", type=int, help="Rows of the rotary tables.  [default: the model's context]", group="Main")
@option(
    "--speculates",
    is_flag=True,
    help="Add what `build-engine --speculate` does: the logits of each row's last few tokens.",
    group="Main",
)
@option("--block-size", type=int, help="Weights that share a scale (int8, int4).", group="Quantization")
@option("--symmetric/--asymmetric", default=True, help="Without or with zero points.", group="Quantization")
@option("--own-codes", is_flag=True, help="Keep the numbers of a .gguf file's codes.", group="Quantization")
@json_option
@threads_option
def command(
    checkpoint: str,
    out: Path,
    lowering: str,
    precision: str | None,
    max_context: int | None,
    speculates: bool,
    block_size: int | None,
    symmetric: bool,
    own_codes: bool,
    as_json: bool,
    threads: int | None,
) -> None:
    """Write a model's ONNX graph with KV-cache inputs and outputs.

    \b
    Examples:
      qwen-aot export ./Qwen1.5-0.5B-Chat -o ./graph --precision fp16
      qwen-aot export qwen1.5-110b -o ./graph --precision bf16

    A checkpoint (a Hugging Face folder or a .gguf file) gives model.onnx and model.onnx.data. A variant's name gives
    model.onnx alone: its weights are declared as external data that isn't there. A model that takes images has a second
    graph, vision.onnx.
    """
    show_logs()
    from qwen_aot.engines.export import export_graph, require_options
    from qwen_aot.errors import BuildError

    try:
        require_options(lowering, precision, block_size, symmetric, max_context)
    except BuildError as error:
        raise click.UsageError(str(error)) from None
    from qwen_aot.exporter.checkpoint.open import open_checkpoint
    from qwen_aot.runtime.cli.source import find_variant

    with progress_on_stderr() as show:
        if Path(checkpoint).exists():
            with open_checkpoint(Path(checkpoint)) as source:
                done = export_graph(
                    source.config,
                    out,
                    checkpoint=source,
                    lowering=lowering,
                    precision=precision,
                    block_size=block_size,
                    symmetric=symmetric,
                    own_codes=own_codes,
                    max_context=max_context,
                    speculates=speculates,
                    threads=threads,
                    on_progress=show,
                )
        else:
            done = export_graph(
                find_variant(checkpoint)[1],
                out,
                lowering=lowering,
                precision=precision,
                block_size=block_size,
                symmetric=symmetric,
                own_codes=own_codes,
                max_context=max_context,
                speculates=speculates,
                on_progress=show,
            )
    peak = max(cost.peak_memory_bytes for cost in done.stages)
    seconds = sum(cost.seconds for cost in done.stages)
    if as_json:
        print_json(
            {
                "graph": str(done.graph),
                "vision_graph": None if done.vision_graph is None else str(done.vision_graph),
                "graph_bytes": done.graph.stat().st_size,
                "weight_bytes": done.weight_bytes,
                "has_weights": done.has_weights,
                "seconds": seconds,
                "peak_memory_bytes": peak,
                "stages": [asdict(cost) for cost in done.stages],
            }
        )
        return
    weights = size(done.weight_bytes) + (" of weights" if done.has_weights else " of weights declared, not written")
    say(
        stdout(),
        f"{done.graph}: {size(done.graph.stat().st_size)}, {weights}, {duration(seconds)}, peak memory {size(peak)}",
    )
