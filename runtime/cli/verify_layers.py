"""What `verify --per-layer` does and shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_aot.runtime.cli.console import stdout

if TYPE_CHECKING:
    from qwen_aot.engines.bundle.progress import OnProgress
    from qwen_aot.engines.verify.per_layer import LayerReport
    from qwen_aot.exporter.checkpoint.base import Checkpoint
    from qwen_aot.runtime.bundle.load import Bundle


def compare(
    bundle: Bundle, checkpoint: Checkpoint, text: str, window: int, bound: float | None, on_progress: OnProgress
) -> LayerReport:
    """Compares the layers over the text's first tokens (random ones for a bundle without a tokenizer)."""
    from qwen_aot.engines.spec.precisions import judged_as
    from qwen_aot.engines.verify.layer_graphs import bound_for, compare_bundle_layers

    manifest, engine = bundle.manifest, bundle.manifest.engines.text
    limit = min(window, manifest.max_context, manifest.prefill_chunk, engine.rotary_length or window)
    token_ids = _token_ids(bundle, text)[:limit]
    return compare_bundle_layers(
        bundle.path,
        manifest,
        checkpoint,
        token_ids,
        bound_for(judged_as(engine.precision, engine.quantization, engine.cache_dtype)) if bound is None else bound,
        on_progress,
    )


def _token_ids(bundle: Bundle, text: str) -> list[int]:
    if (name := bundle.manifest.text.tokenizer) is not None:
        from tokenizers import Tokenizer

        return list(Tokenizer.from_file(str(bundle.path / name)).encode(text, add_special_tokens=False).ids)
    import numpy as np

    drawn: list[int] = np.random.default_rng(0).integers(0, bundle.manifest.model.vocab_size, 256).tolist()
    return drawn


def show(report: LayerReport, bundle: Path, target: str) -> None:
    """A table, and the first layer over the bound."""
    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    table = Table(title=f"residual stream after each layer, {report.tokens} tokens, by {report.provider}")
    for heading in ("layer", "max abs", "mean abs", "median relative", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for row in report.layers:
        verdict = "[green]ok[/]" if row.has_passed else "[bold red]over the bound[/]"
        name = "logits" if row.layer < 0 else str(row.layer)
        table.add_row(
            name, f"{row.max_absolute:.3g}", f"{row.mean_absolute:.3g}", f"{row.median_relative:.3g}", verdict
        )
    console.print(table)
    if target.startswith("tensorrt"):
        console.print(
            f"{escape(str(bundle))} is a TensorRT engine, whose layers can't be looked at: this is the ONNX that it "
            "was compiled from, made again from the checkpoint, the same by its SHA-256, and run on the CPU; the "
            "engine itself was not run"
        )
    first = report.first_failed
    if first is None:
        console.print(f"[bold green]every median is within {report.bound:g}[/]")
    else:
        where = "the logits" if first < 0 else f"layer {first}"
        console.print(f"[bold red]first over the bound of {report.bound:g}: {where}[/]")
