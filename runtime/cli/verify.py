"""`verify`: a bundle against Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_aot.errors import BuildError, EngineMismatchError
from qwen_aot.runtime.cli.command import EXIT_FAILED, EXIT_INCONCLUSIVE, VerbCommand, option
from qwen_aot.runtime.cli.console import busy, count, print_json, progress_on_stderr, show_logs, size, stdout
from qwen_aot.runtime.cli.options import (
    CONTEXT,
    allow_bundle_code_option,
    bundle_argument,
    json_option,
    kernels_option,
    threads_option,
)
from qwen_aot.runtime.cli.tables import print_table, say
from qwen_aot.runtime.cli.text_file import read_text
from qwen_aot.runtime.cli.visible import visible

if TYPE_CHECKING:
    from qwen_aot.engines.build import Verifier
    from qwen_aot.engines.bundle.progress import OnProgress, ProgressEvent
    from qwen_aot.engines.bundle.stages import Advance
    from qwen_aot.engines.verify.bundle_report import BundleReport
    from qwen_aot.engines.verify.scores import Verification
    from qwen_aot.engines.verify.weights import WeightCheck
    from qwen_aot.exporter.checkpoint.base import Checkpoint
    from qwen_aot.runtime.bundle.manifest import Manifest
    from qwen_aot.runtime.generation.generator import Generator

POSITIONS = "positions"  # what progress counts
RANDOM_TOKENS = 256  # where there is no tokenizer and so no text

# Plain prose, code and figures: what a model is trained on and what quantization disturbs first.
TEXT = """\
The bridge was closed for the winter, so the mail came by boat twice a week. On the morning of the third of March
the boat brought a letter from the county: the repairs would cost 48,500 and take until the end of June. Nobody in
the village was surprised. "They said June last year as well," the baker remarked, and went back to her ovens.

A queue gives back its elements in the order in which they were added; a stack gives back the newest first. Both can
be built on a list. In Python:

def drain(queue):
    while queue:
        item = queue.pop(0)
        yield item

Popping from the front moves every other element, so a long queue is better kept in a deque, whose both ends are cheap.

Water boils at 100 degrees Celsius at sea level. The pressure falls with height, and with it the boiling point: on a
mountain of 3,000 metres water boils at about 90 degrees, and rice takes longer to cook. What is the capital of France?
The capital of France is Paris, which lies on the Seine. Seven times eight is fifty-six, and half of that is
twenty-eight.
"""

_BOUND_HELP = {
    "max_logit_difference": "Largest absolute difference of a logit.",
    "mean_logit_difference": "Mean absolute difference of the logits.",
    "kl_divergence": "Mean KL divergence in nats.",
    "top1_agreement": "Least share of decisive positions with the same first token.",
    "greedy_agreement": "Least share of the reference's greedy tokens that the bundle chooses too.",
    "perplexity_ratio": "Bundle's perplexity over the reference's.",
}


def _bound_options(command: Any) -> Any:
    for name, help_ in reversed(_BOUND_HELP.items()):
        flag = "--" + name.replace("_", "-")
        decorate = option(flag, name, type=float, help=help_, group="Bounds (defaults: the precision's)")
        command = decorate(command)
    return command


@click.command("verify", cls=VerbCommand, context_settings=CONTEXT)
@bundle_argument
@option("--reference", required=True, metavar="CHECKPOINT", help="What the bundle was built from.", group="Input")
@option("--random-weights", is_flag=True, help="The reference is a variant's name, as in the build.", group="Input")
@option("--seed", "weights_seed", default=0, help="Of the random weights.", group="Input")
@option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to score.  [default: a built-in page]",
    group="Input",
)
@option("--window", type=click.IntRange(4), default=256, help="Tokens scored in one piece.", group="Input")
@option("--windows", type=click.IntRange(1), default=4, help="Most pieces of the text.", group="Input")
@option("--greedy-tokens", type=click.IntRange(1), default=32, help="Generated after each prompt.", group="Input")
@option(
    "--skip-weights",
    is_flag=True,
    help="Leave out comparing every weight with the checkpoint's; nothing passes then.",
    group="Input",
)
@option("--per-layer", is_flag=True, help="Compare what each layer gives instead of the logits.", group="Layers")
@option(
    "--layer-bound",
    type=click.FloatRange(0, min_open=True),
    help="Of the median relative difference.  [default: the precision's]",
    group="Layers",
)
@_bound_options
@json_option
@threads_option
@kernels_option
@allow_bundle_code_option
def command(
    bundle: Path,
    reference: str,
    random_weights: bool,
    weights_seed: int,
    text: Path | None,
    window: int,
    windows: int,
    greedy_tokens: int,
    skip_weights: bool,
    per_layer: bool,
    layer_bound: float | None,
    as_json: bool,
    threads: int | None,
    kernels: str | None,
    allow_bundle_code: bool,
    **bounds: float | None,
) -> None:
    """Compare a bundle with Hugging Face transformers in fp32.

    \b
    Examples:
      qwen-aot verify ./bundle --reference ./Qwen1.5-0.5B-Chat
      qwen-aot verify ./bundle --reference model.gguf --kl-divergence 0.1 --json

    First every weight is made again from the checkpoint and compared, byte by byte (of a TensorRT engine by its hash).
    Then both answer: the first quarter of each piece of text is the prompt, the rest is fed token by token, and every
    step's logits are compared.

    Exits with 0 if all of it passed, with 1 if something failed, and says what, and with 3 if it is inconclusive: no
    difference was found that mustn't be, and it couldn't have been (random weights, a text too short).

    --per-layer compares the residual stream after each layer with that of the checkpoint's fp32 graph over one prompt,
    with Polygraphy, and names the first layer over the bound. Of a TensorRT bundle it runs the ONNX behind the engine.
    """
    show_logs()
    if layer_bound is not None and not per_layer:
        raise click.UsageError("--layer-bound goes with --per-layer")
    if skip_weights and per_layer:
        raise click.UsageError("--skip-weights doesn't go with --per-layer, which compares no weights")
    if kernels is not None and per_layer:
        raise click.UsageError("--kernels doesn't go with --per-layer, which runs the graph for ONNX Runtime's")
    content = TEXT if text is None else read_text(text)
    if per_layer:
        _run_per_layer(bundle, reference, random_weights, weights_seed, content, window, layer_bound, as_json)
        return
    from qwen_aot.engines.verify.verdict import Verdict
    from qwen_aot.runtime.bundle.load import load_bundle
    from qwen_aot.runtime.cli.source import open_source

    with (
        open_source(reference, random_weights=random_weights, seed=weights_seed) as checkpoint,
        progress_on_stderr() as show,
    ):
        report = verify_bundle(
            bundle,
            checkpoint,
            text=content,
            window=window,
            windows=windows,
            greedy_tokens=greedy_tokens,
            threads=threads,
            kernels=kernels,
            skip_weights=skip_weights,
            allow_bundle_code=allow_bundle_code,
            on_progress=show,
            **bounds,
        )
    if as_json:
        print_json({"bundle": str(bundle), "reference": reference, **_with_cpu(report.to_json())})
    else:
        _show(report, runs_on_cpu=load_bundle(bundle, skip_hash_above=0).manifest.target == "cpu")
    if report.verdict is not Verdict.PASSED:
        click.get_current_context().exit(EXIT_FAILED if report.verdict is Verdict.FAILED else EXIT_INCONCLUSIVE)


def _run_per_layer(
    path: Path,
    reference: str,
    random_weights: bool,
    weights_seed: int,
    text: str,
    window: int,
    bound: float | None,
    as_json: bool,
) -> None:
    from qwen_aot.engines.verify.same_model import require_same_model
    from qwen_aot.runtime.bundle.load import load_bundle
    from qwen_aot.runtime.cli import verify_layers
    from qwen_aot.runtime.cli.source import open_source

    with busy(f"loading {path}"):
        bundle = load_bundle(path)
    with (
        open_source(reference, random_weights=random_weights, seed=weights_seed) as checkpoint,
        progress_on_stderr() as show,
    ):
        require_same_model(bundle.manifest, checkpoint)
        report = verify_layers.compare(bundle, checkpoint, text, window, bound, show)
    if as_json:
        print_json({"bundle": str(path), "reference": reference, **report.to_json()})
    else:
        verify_layers.show(report, path, bundle.manifest.target)
    if report.first_failed is not None:
        click.get_current_context().exit(EXIT_FAILED)


def verify_bundle(
    path: Path,
    checkpoint: Checkpoint,
    *,
    text: str = TEXT,
    window: int = 256,
    windows: int = 4,
    greedy_tokens: int = 32,
    threads: int | None = None,
    kernels: str | None = None,
    skip_weights: bool = False,
    allow_bundle_code: bool = False,
    on_progress: OnProgress,
    **bounds: float | None,
) -> BundleReport:
    """Compares a bundle's weights and its answers with the checkpoint that it was built from.

    Answers are only asked for where the weights are as they should be (others would say nothing new, and slowly), and
    where this machine can run the engine: a machine without a GPU compares a TensorRT bundle's weights.

    Args:
        path: the bundle's folder.
        checkpoint: opened; it stays open.
        text: scored, where the bundle has a tokenizer; else tokens are drawn.
        window: tokens of a piece of it.
        windows: pieces at most.
        greedy_tokens: generated after each prompt.
        threads: of the engine, and that make weights again.
        kernels: see `Generator.open`.
        skip_weights: leave the weights out, and be inconclusive.
        allow_bundle_code: see `Generator.open`.
        on_progress: told about each step.
        bounds: in place of the precision's, by the names of `engines.spec.bounds.Bounds`.

    Raises:
        CheckpointError: the bundle was built from another model.
        BuildError: its context or the text is too short to be scored.
    """
    from qwen_aot.engines.verify.bundle_report import BundleReport
    from qwen_aot.engines.verify.same_model import require_same_model
    from qwen_aot.engines.verify.verdict import Verdict
    from qwen_aot.engines.verify.weights import SKIPPED
    from qwen_aot.runtime.backends.cpu.kernels import kernels_of
    from qwen_aot.runtime.bundle.load import load_bundle
    from qwen_aot.runtime.generation.generator import Generator

    manifest = load_bundle(path, skip_hash_above=0).manifest  # a damaged weight is named by its tensor, not by its file
    require_same_model(manifest, checkpoint)
    length = _window_length(manifest, window, greedy_tokens)
    count = 2 if skip_weights else 3
    weights = SKIPPED if skip_weights else _check_weights(path, manifest, checkpoint, threads, count, on_progress)
    if weights.verdict is Verdict.FAILED:
        return BundleReport(weights, None, None)
    try:
        opened = Generator.open(path, threads=threads, kernels=kernels, allow_bundle_code=allow_bundle_code)
    except EngineMismatchError as error:
        return BundleReport(weights, None, None, not_run=str(error))
    with opened as generator:
        ran = generator.engine.manifest
        scores, read_by = _score(
            generator, checkpoint, text, length, windows, greedy_tokens, bounds, count, on_progress
        )
    return BundleReport(weights, scores, read_by, kernels=kernels_of(ran))


def _window_length(manifest: Manifest, window: int, greedy_tokens: int) -> int:
    from qwen_aot.engines.verify.scores import SHORTEST_WINDOW

    length = min(window, manifest.max_context - greedy_tokens)
    if length < SHORTEST_WINDOW:
        raise BuildError(
            f"the bundle's context of {manifest.max_context} tokens has no room for a window of at least "
            f"{SHORTEST_WINDOW} and {greedy_tokens} greedy tokens: give fewer --greedy-tokens, or build with a "
            "larger --max-context"
        )
    return length


def _check_weights(
    path: Path, manifest: Manifest, checkpoint: Checkpoint, threads: int | None, count: int, on_progress: OnProgress
) -> WeightCheck:
    from qwen_aot.engines.bundle.progress import ProgressEvent
    from qwen_aot.engines.verify.weights import check_weights

    stage = "compare weights"
    on_progress(ProgressEvent(stage, 1, count))
    found = check_weights(
        path,
        manifest,
        checkpoint,
        on_progress=lambda done, total: on_progress(ProgressEvent(stage, 1, count, done, total)),
        on_layer=lambda done, total: on_progress(ProgressEvent("calibrate", 1, count, done, total, "layers")),
        threads=threads,
    )
    on_progress(ProgressEvent(stage, 1, count, 1, 1))
    return found


def _score(
    generator: Generator,
    checkpoint: Checkpoint,
    text: str,
    length: int,
    windows: int,
    greedy_tokens: int,
    bounds: Mapping[str, float | None],
    count: int,
    on_progress: OnProgress,
) -> tuple[Verification, str]:
    """Scores an open bundle against the reference, and tells who read the checkpoint for that."""
    import numpy as np

    from qwen_aot.engines.bundle.progress import ProgressEvent
    from qwen_aot.engines.verify import scores as verify
    from qwen_aot.engines.verify.reference import Reference

    manifest = generator.engine.manifest
    engine = manifest.engines.text
    limits = verify.limits_for(
        engine.precision, manifest.model.num_parameters, engine.quantization, engine.cache_dtype, **bounds
    )
    if generator.tokenizer is not None:
        ids = generator.tokenizer.encode(text)
    else:
        ids = np.random.default_rng(0).integers(0, manifest.model.vocab_size, RANDOM_TOKENS).tolist()
    pieces = verify.windows(ids, length, windows)
    on_progress(ProgressEvent("load reference", count - 1, count))
    # Floats made of the codes have nothing to do with how the checkpoint rounds inputs.
    reference = Reference(checkpoint, rounds_inputs=bool(engine.quantization.get("own_codes")))
    on_progress(ProgressEvent("load reference", count - 1, count, 1, 1))
    found = verify.verify(
        generator.engine,
        reference,
        pieces,
        limits,
        greedy_tokens=greedy_tokens,
        unrounded=reference.unrounded,
        on_progress=lambda done, total: on_progress(ProgressEvent("compare", count, count, done, total, POSITIONS)),
    )
    return found, reference.read_by


def verifier_for(checkpoint: Checkpoint) -> Verifier:
    """What `build --verify` runs on the new bundle before it is put in place.

    What fails isn't put there. What is inconclusive is: its weights are the checkpoint's by every byte, and the build
    warns of what wasn't shown.
    """

    def verifier(folder: Path, advance: Advance) -> Mapping[str, Any]:
        from qwen_aot.engines.verify.bundle_report import require_not_failed

        def show(event: ProgressEvent) -> None:
            if event.unit == POSITIONS:
                advance(event.done, event.total)

        return _with_cpu(require_not_failed(verify_bundle(folder, checkpoint, on_progress=show)))

    return verifier


def _with_cpu(report: Mapping[str, Any]) -> dict[str, Any]:
    from qwen_aot.runtime.cli.doctor import processor

    return {**report, "cpu": processor()}


def _show(report: BundleReport, *, runs_on_cpu: bool) -> None:
    from rich.text import Text

    from qwen_aot.engines.verify.verdict import Verdict
    from qwen_aot.runtime.cli.doctor import processor

    console = stdout()
    weights = report.weights
    if weights.compared is not None and weights.verdict is Verdict.PASSED:
        how = "by every byte" if weights.compared == "bytes" else "by their hashes"
        say(console, f"weights: {weights.tensors} tensors, {size(weights.bytes)}, are the checkpoint's {how}")
    if report.scores is not None:
        _show_scores(report.scores)
        if runs_on_cpu:
            cpu = processor()
            say(
                console,
                f"computed by {cpu['name']} ({', '.join(cpu['features']) or 'no special features'}): another CPU adds "
                "in another order, after which rounded activations differ, and finds other numbers",
            )
        say(console, f"the reference was read by {report.reference_reader}")
    if report.verdict is Verdict.PASSED:
        say(console, Text.assemble(("passed", "bold green"), ": the weights are the checkpoint's and all bounds hold"))
        return
    style = "bold red" if report.verdict is Verdict.FAILED else "bold yellow"
    for reason in report.reasons:
        say(console, Text.assemble((report.verdict.value, style), f": {visible(reason)}"))


def _show_scores(result: Verification) -> None:
    from rich.text import Text

    scores = result.scores
    checked = {check.name: check for check in result.checks}
    measures = {
        "max_logit_difference": scores.max_logit_difference,
        "mean_logit_difference": scores.mean_logit_difference,
        "kl_divergence": scores.kl_divergence,
        "top1_agreement (all)": scores.top1_agreement,
        f"top1_agreement ({scores.decisive_positions} decisive)": scores.decisive_top1_agreement,
        "greedy_agreement": scores.greedy_agreement,
        "greedy_prefix": scores.greedy_prefix,
        "perplexity": scores.perplexity,
        "perplexity of the reference": scores.reference_perplexity,
        "perplexity_ratio": scores.perplexity_ratio,
    }
    if scores.rounding_share is not None:
        measures["rounding_share"] = scores.rounding_share
    rows = []
    for name, found in measures.items():
        check = checked.get(name.partition(" ")[0]) if "(all)" not in name else None
        bound = f"{'<=' if check.is_upper else '>='} {check.bound:g}" if check else ""
        error = f" ± {check.uncertainty:.2g}" if check and check.uncertainty else ""
        verdict = Text("ok", "green") if check and check.has_passed else Text("failed" if check else "", "bold red")
        rows.append((name, "-" if found is None else f"{found:.6g}{error}", bound, verdict))
    title = f"{count(scores.positions, 'position')}, {count(scores.greedy_tokens, 'greedy token')}"
    print_table(stdout(), ("measure", "found", "bound", "verdict"), rows, numbers=("found", "bound"), title=title)
