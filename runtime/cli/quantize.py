"""`quantize`: a checkpoint in, a folder of codes out, as GPTQ, AWQ or compressed-tensors have them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import count, duration, print_json, progress_on_stderr, show_logs, size, stdout
from qwen_aot.runtime.cli.options import CONTEXT, GivenPath, json_option, threads_option
from qwen_aot.runtime.cli.tables import print_facts, say
from qwen_aot.runtime.cli.text_file import read_text

if TYPE_CHECKING:
    from qwen_aot.engines.quantize import QuantizeReport


def _algorithms() -> str:
    from qwen_aot.exporter.rounding.algorithms import ALGORITHMS, DEFAULT_ALGORITHM

    forms = "; ".join(f"{name}: {row.summary}" for name, row in ALGORITHMS.items())
    return f"{forms}.  [default: {DEFAULT_ALGORITHM}]"


def _formats() -> str:
    from qwen_aot.engines.spec.quantize_spec import FORMATS

    return f"Of the folder: {', '.join(FORMATS)}.  [default: {FORMATS[0]}]"


@click.command("quantize", cls=VerbCommand, context_settings=CONTEXT)
@click.argument("checkpoint")
@option("-o", "--output", "out", required=True, type=GivenPath(), help="The quantized folder.", group="Main")
@option("--algorithm", help=_algorithms, group="Main")
@option("--format", help=_formats, group="Main")
@option("--restart", is_flag=True, help="Give up an unfinished job of this output, and start anew.", group="Main")
@option("--bits", type=int, help="4 or 8 of most matrices.  [default: 4; with rounded inputs: 8]", group="Codes")
@option(
    "--group-size",
    type=int,
    help="Weights that share a scale, at most.  [default: 64; with rounded inputs: whole rows]",
    group="Codes",
)
@option(
    "--symmetric/--asymmetric",
    default=None,
    help="Without or with zero points.  [default: symmetric, but for awq]",
    group="Codes",
)
@option(
    "--sensitive-bits",
    type=int,
    help="8 or 4: down projections.  [default: 8, where the format can mix]",
    group="Codes",
)
@option(
    "--table-bits",
    type=int,
    help="16, 8 or 4: embedding and head; 16 are plain numbers.  [default: 16]",
    group="Codes",
)
@option(
    "--bits-per-weight",
    type=float,
    help="Choose each matrix's bits and groups by what it loses, within this average.",
    group="Codes",
)
@option(
    "--plain-share",
    type=float,
    help="With rounded inputs (smoothquant, gptq-fp8): share of the weights that may stay plain, those that would lose "
    "most.  [default: 0.15]",
    group="Codes",
)
@option(
    "--text",
    "text_files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to calibrate with; may be given several times.  [default: built-in texts]",
    group="Calibration",
)
@option("--tokens", type=int, help="Of the texts that are looked at.  [default: 16384]", group="Calibration")
@option("--sequence-length", type=int, help="Tokens of each piece of them.  [default: 256]", group="Calibration")
@option("--seed", type=click.IntRange(0), default=0, help="Of what is drawn.", group="Calibration")
@option("--random-weights", is_flag=True, help="For a variant's name: weights drawn from --seed.", group="Trial")
@json_option
@threads_option
def command(
    checkpoint: str,
    out: Path,
    restart: bool,
    text_files: tuple[Path, ...],
    random_weights: bool,
    seed: int,
    as_json: bool,
    threads: int | None,
    **request: Any,
) -> None:
    """Quantize a checkpoint into a GPTQ or AWQ folder.

    \b
    Examples:
      qwen-aot quantize ./Qwen1.5-0.5B-Chat -o ./Qwen1.5-0.5B-Chat-int4
      qwen-aot quantize ./Qwen1.5-7B -o ./awq --algorithm awq --format awq

    One layer is in memory at a time. A job that was killed goes on where it stopped when the same command is given
    again. build-engine makes a bundle of the folder that has the very same codes.
    """
    from qwen_aot.engines.spec.quantize_spec import QuantizeSpec
    from qwen_aot.errors import BuildError

    show_logs()
    try:
        spec = QuantizeSpec(seed=seed, **{name: value for name, value in request.items() if value is not None})
    except BuildError as error:
        raise click.UsageError(str(error)) from None
    given = {"--text": text_files, "--tokens": request["tokens"], "--sequence-length": request["sequence_length"]}
    for option_name, value in given.items():
        if value and not spec.how.uses_texts:
            raise click.UsageError(
                f"{option_name} goes with an algorithm that looks at texts, and {spec.algorithm} doesn't"
            )
    if text_files and random_weights:
        raise click.UsageError("--text and --random-weights exclude each other: such a model has no tokenizer")
    texts = [read_text(path) for path in text_files]
    from qwen_aot.engines.quantize import quantize_checkpoint
    from qwen_aot.runtime.cli.source import open_source

    with (
        open_source(checkpoint, random_weights=random_weights, seed=seed) as source,
        progress_on_stderr() as show,
    ):
        report = quantize_checkpoint(source, spec, out, texts=texts, restart=restart, threads=threads, on_progress=show)
    if as_json:
        print_json({"folder": str(report.out), **report.to_json()})
    else:
        _show(report)


def _show(report: QuantizeReport) -> None:
    console = stdout()
    by_error = sorted(report.errors.items(), key=lambda item: -item[1])
    worst = ", ".join(f"{name} {error:.3g}" for name, error in by_error[:3])
    mean = sum(report.errors.values()) / len(report.errors)
    print_facts(
        console,
        [
            ("bits a weight", f"{report.bits_per_weight:.2f} of {len(report.forms)} rounded matrices"),
            ("calibrated with", count(report.tokens, "token") if report.tokens else "nothing"),
            ("lost", f"{mean:.3g} of each matrix's outputs, as squares; most: {worst}"),
        ],
    )
    written = sum(path.stat().st_size for path in report.out.iterdir())
    say(
        console,
        f"{report.out}: {size(written)}, quantized in {duration(report.seconds)}, peak memory "
        f"{size(report.peak_memory_bytes)}",
    )
