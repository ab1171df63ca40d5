"""`compare`: bundles of one checkpoint beside each other, with what each loses and costs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_aot.errors import BundleError, DeployError, EngineMismatchError
from qwen_aot.runtime.cli.command import EXIT_FAILED, EXIT_INCONCLUSIVE, VerbCommand, option
from qwen_aot.runtime.cli.comparison_table import Row, show
from qwen_aot.runtime.cli.console import count, print_json, progress_on_stderr, show_logs, stdout, tell
from qwen_aot.runtime.cli.options import (
    CONTEXT,
    GivenPath,
    PlotPath,
    allow_bundle_code_option,
    json_option,
    kernels_option,
    threads_option,
)
from qwen_aot.runtime.cli.tables import say
from qwen_aot.runtime.cli.text_file import read_text
from qwen_aot.runtime.cli.visible import visible

if TYPE_CHECKING:
    from qwen_aot.engines.bundle.progress import OnProgress
    from qwen_aot.engines.verify.comparison import Scored, Windows
    from qwen_aot.engines.verify.kept_reference import KeptReference
    from qwen_aot.exporter.checkpoint.base import Checkpoint
    from qwen_aot.runtime.bundle.load import Bundle
    from qwen_aot.runtime.bundle.manifest import Manifest
    from qwen_aot.runtime.generation.generator import Generator
    from qwen_aot.runtime.measure.rounds import Spread

POSITIONS = "positions"  # what progress counts
WINDOW = 512  # tokens, less where a context is shorter
GREEDY_TOKENS = 32  # behind each window's first quarter, fewer where a context is shorter
PROMPT_TOKENS, GEN_TOKENS, ROUNDS = 32, 64, 3  # of a decode rate; the tokens fewer where the context is shorter
LAYER_TOKENS = 256  # of the first window, over which layers are compared
RANDOM_TOKENS = 1024  # where there is no tokenizer and so no text


@click.command("compare", cls=VerbCommand, context_settings=CONTEXT)
@click.argument("bundles", metavar="BUNDLE...", type=GivenPath(exists=True), nargs=-1, required=True)
@option("--reference", required=True, metavar="CHECKPOINT", help="What the bundles were built from.", group="Input")
@option("--random-weights", is_flag=True, help="The reference is a variant's name, as in the build.", group="Input")
@option("--seed", "weights_seed", type=click.IntRange(0), default=0, help="Of the random weights.", group="Input")
@option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to score; may be given again.  [default: the built-in prose, code and Chinese]",
    group="Input",
)
@option("--tokens", type=click.IntRange(4), help="Most tokens to score, of each text in turn.  [default: all]",
        group="Input")  # fmt: skip
@option(
    "--window",
    type=click.IntRange(4),
    help=f"Tokens scored in one piece.  [default: {WINDOW}, or the shortest context]",
    group="Input",
)
@option("--plot", type=PlotPath(), help="Draw size against KL, and each layer's error: a .png or .svg file.",
        group="Output")  # fmt: skip
@json_option
@threads_option
@kernels_option
@allow_bundle_code_option
def command(
    bundles: tuple[Path, ...],
    reference: str,
    random_weights: bool,
    weights_seed: int,
    texts: tuple[Path, ...],
    tokens: int | None,
    window: int | None,
    plot: Path | None,
    as_json: bool,
    threads: int | None,
    kernels: str | None,
    allow_bundle_code: bool,
) -> None:
    """Compare bundles of a checkpoint: size, loss and speed.

    \b
    Examples:
      qwen-aot compare ./int8 ./int4 --reference ./Qwen1.5-0.5B-Chat
      qwen-aot compare ./int8 ./int4 --reference model.gguf --plot loss.png

    The reference, Hugging Face transformers in fp32, runs once; its logits are kept in a temporary file (4 bytes for
    each word of the vocabulary and each token). Then each bundle is fed the same texts, a token a step on all of its
    rows, and greedy decoding is timed. Errors (±) are standard errors of the mean over the positions.

    KL is of the next tokens' distribution, in nats. ratio is of perplexities, over the reference's. top-1: positions
    with the same likeliest token. greedy: choices that are the reference's own, given its text so far.

    Exits with 0 if all bundles were compared, with 1 if one failed while it ran, and with 3 if this machine can't run
    one; the others are compared all the same. If it can run none, nothing is compared, and that is a failure.
    """
    show_logs()
    _require_different(bundles, "BUNDLE")
    _require_different(texts, "--text")
    if plot is not None:
        importlib.import_module("matplotlib")  # what is missing is said before the work
        importlib.import_module("polygraphy")
    samples = [(str(path), read_text(path)) for path in texts] or None
    from qwen_aot.runtime.bundle.load import load_bundle
    from qwen_aot.runtime.cli.source import open_source

    loaded = {name: load_bundle(path, skip_hash_above=0) for name, path in _named(bundles).items()}
    length = _window_length(window, {name: bundle.manifest.max_context for name, bundle in loaded.items()})
    job = _Job(loaded, length, tokens, samples, threads, kernels, allow_bundle_code)

    with (
        open_source(reference, random_weights=random_weights, seed=weights_seed) as checkpoint,
        progress_on_stderr() as on_progress,
    ):
        report = job.run(checkpoint, on_progress, with_random_tokens=random_weights, with_layers=plot is not None)
    has_plot = plot is not None and any(row.scored is not None for row in report.rows[1:])
    if as_json:
        print_json({"reference": reference, "plot": str(plot) if has_plot else None, **report.to_json()})
    else:
        report.show()
    if plot is not None and has_plot:
        report.draw(plot)
    elif plot is not None:
        tell(f"{plot} wasn't written: no bundle was compared, so that there is nothing to draw")
    if any(row.not_compared for row in report.rows):
        click.get_current_context().exit(EXIT_FAILED if report.has_failed else EXIT_INCONCLUSIVE)


def _require_different(paths: Sequence[Path], what: str) -> None:
    seen: dict[Path, Path] = {}
    for path in paths:
        if (first := seen.setdefault(path.resolve(), path)) is not path:
            other = "" if str(first) == str(path) else f", first as {first}"
            raise click.UsageError(f"{what} {path} is given twice{other}; give each once")


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """Each bundle by its folder's name, or where two have the same by the path as given."""
    names = [path.resolve().name for path in paths]
    return {(name if names.count(name) == 1 else str(path)): path for name, path in zip(names, paths, strict=True)}


@dataclass(frozen=True, slots=True)
class Report:
    """All rows, and what they were found on.

    Attributes:
        rows: the reference's first.
        has_failed: a bundle failed while it ran.
        window: tokens of a piece, at most.
        windows: pieces.
        reference_reader: who read the checkpoint for the reference.
        model: its name.
    """

    rows: tuple[Row, ...]
    has_failed: bool
    window: int
    windows: int
    reference_reader: str
    model: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        from qwen_aot.runtime.cli.doctor import processor

        return {
            "model": self.model,
            "reference_reader": self.reference_reader,
            "window": self.window,
            "windows": self.windows,
            "cpu": processor(),
            "rows": [row.to_json() for row in self.rows],
        }

    def show(self) -> None:
        """Tables, then what they can't say."""
        from rich.text import Text

        scored = self.rows[0].scored
        assert scored is not None
        tokens = f"{scored.overall.positions:,} tokens in {count(self.windows, 'window')} of up to {self.window}"
        show(self.rows, f"{self.model}: {tokens}, {scored.overall.greedy_tokens:,} greedy ones")
        console = stdout()
        say(console, f"\nthe reference was read by {self.reference_reader}")
        for row in self.rows:
            if row.not_compared is not None:
                reason = f": {visible(row.name)} wasn't compared: {visible(row.not_compared)}"
                say(console, Text.assemble(("note", "bold yellow"), reason))
            if row.no_layers is not None:
                say(console, f"the layers of {row.name} aren't drawn: {row.no_layers}")

    def draw(self, path: Path) -> None:
        """Writes the plot of at least one compared bundle, whole or not at all.

        Raises:
            OSError: it can't be written.
        """
        from qwen_aot.engines.verify.comparison_plot import Drawn, draw
        from qwen_aot.figures import render
        from qwen_aot.whole_file import write_whole

        drawn = [
            Drawn(
                row.name,
                row.weight_bytes,
                row.scored.overall.kl_divergence,
                row.scored.overall.kl_error,
                None if row.layers is None else tuple(layer.median_relative for layer in row.layers.layers[:-1]),
            )
            for row in self.rows[1:]
            if row.scored is not None
        ]
        write_whole(path, render(draw(drawn, f"{self.model}: loss against the fp32 checkpoint"), path.suffix))


@dataclass(frozen=True, slots=True)
class _Job:
    """A comparison from the options to the report.

    Attributes:
        bundles: by the names that they are shown by; hashed when they are opened.
        window: tokens of a piece, at most.
        tokens: to score, at most; None: all.
        samples: kind and text of each; None: the built-in ones.
        threads: of bundles that run on the CPU.
        kernels: likewise; see `Generator.open`.
        allow_bundle_code: see `Generator.open`.
    """

    bundles: Mapping[str, Bundle]
    window: int
    tokens: int | None
    samples: Sequence[tuple[str, str]] | None
    threads: int | None
    kernels: str | None
    allow_bundle_code: bool

    def run(
        self, checkpoint: Checkpoint, on_progress: OnProgress, *, with_random_tokens: bool, with_layers: bool
    ) -> Report:
        """Compares what can be compared.

        Args:
            checkpoint: what the bundles were built from; it stays open.
            on_progress: told about each step.
            with_random_tokens: score drawn tokens where no bundle has a tokenizer.
            with_layers: compare each bundle's layers too.

        Raises:
            CheckpointError: a bundle was built from another model.
            BundleError: a bundle is damaged, has another tokenizer, or none can be run.
            BuildError: a text is too short, or there is no room for the reference's logits.
        """
        from qwen_aot.engines.bundle.progress import ProgressEvent
        from qwen_aot.engines.verify.comparison import cut, score_itself, weight_bytes
        from qwen_aot.engines.verify.kept_reference import keep_reference
        from qwen_aot.engines.verify.reference import Reference
        from qwen_aot.engines.verify.same_model import require_same_model

        for bundle in self.bundles.values():
            require_same_model(bundle.manifest, checkpoint)
        stages = 2 + len(self.bundles) + (1 + len(self.bundles) if with_layers else 0)
        on_progress(ProgressEvent("open bundles", 1, stages))
        unable, texts = self._prepare(with_random_tokens)
        on_progress(ProgressEvent("open bundles", 1, stages, 1, 1))
        pieces = cut(texts, self.window, self.tokens)
        rows = [
            _row(name, bundle, weight_bytes(bundle.manifest), unable.get(name)) for name, bundle in self.bundles.items()
        ]
        readers: list[str] = []

        def load() -> Reference:
            reference = Reference(checkpoint)
            readers.append(reference.read_by)
            return reference

        def advance(done: int, total: int) -> None:
            on_progress(ProgressEvent("run the reference", 2, stages, done, total, POSITIONS))

        on_progress(ProgressEvent("run the reference", 2, stages))
        with keep_reference(
            load,
            pieces.token_ids,
            checkpoint.config.vocab_size,
            greedy_tokens=self._greedy_tokens(),
            on_progress=advance,
        ) as reference:
            parameters = rows[0].num_parameters
            facts: dict[str, Any] = {"target": None, "precision": "fp32", "quantization": {}}
            own = score_itself(reference, pieces.kinds)
            first = Row("reference, fp32", None, facts, 4 * parameters, parameters, own)
            has_failed = False
            for index, row in enumerate(rows):
                if row.not_compared is None:
                    rows[index], failed = self._score(row, reference, pieces, (3 + index, stages), on_progress)
                    has_failed |= failed
        if with_layers:
            rows = _with_layers(rows, self.bundles, checkpoint, pieces, (3 + len(rows), stages), on_progress)
        model = next(iter(self.bundles.values())).manifest.model.name
        return Report((first, *rows), has_failed, self.window, len(pieces.token_ids), readers[0], model)

    def _greedy_tokens(self) -> int:
        """So many as every context holds behind the first quarter of a window."""
        return min(GREEDY_TOKENS, *(each.manifest.max_context - self.window // 4 for each in self.bundles.values()))

    def _prepare(self, with_random_tokens: bool) -> tuple[dict[str, str], list[tuple[str, list[int]]]]:
        """Why this machine can't run some bundles, and the texts as token ids: before the reference takes its time."""
        unable: dict[str, str] = {}
        encoded: dict[str, list[tuple[str, list[int]]]] = {}
        for name, bundle in self.bundles.items():
            try:
                with self._open(bundle) as generator:
                    if generator.tokenizer is not None:
                        tokenizer = generator.tokenizer
                        encoded[name] = [(kind, list(tokenizer.encode(text))) for kind, text in self._texts()]
            except EngineMismatchError as error:
                unable[name] = str(error)
        if len(unable) == len(self.bundles):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in unable.items())
            raise EngineMismatchError(f"this machine can run none of the bundles: {reasons}")
        if encoded:
            first, ids = next(iter(encoded.items()))
            for name, other in encoded.items():
                if other != ids:
                    raise BundleError(
                        f"the tokenizer of {name} isn't that of {first}: they make other tokens of the same text, so "
                        "that their numbers can't stand beside each other; give bundles of one checkpoint"
                    )
            return unable, ids
        if not with_random_tokens or self.samples is not None:
            raise BundleError(
                "no bundle has a tokenizer (tokenizer.json), so that there are no tokens to score; build one of them "
                "from a checkpoint that has it"
            )
        return unable, [("random", _drawn(next(iter(self.bundles.values())).manifest))]

    def _texts(self) -> Sequence[tuple[str, str]]:
        if self.samples is not None:
            return self.samples
        from qwen_aot.exporter.calibration.texts import evaluation_texts

        return [(sample.kind, sample.text) for sample in evaluation_texts()]

    def _open(self, bundle: Bundle) -> Generator:
        from qwen_aot.runtime.generation.generator import Generator

        # An engine for a GPU refuses both: it isn't given those of the others, and refuses them where it is alone.
        engines = [each.manifest.engines.text for each in self.bundles.values()]
        is_given = bundle.manifest.engines.text.tensorrt is None or all(each.tensorrt for each in engines)
        threads, kernels = (self.threads, self.kernels) if is_given else (None, None)
        return Generator.open(bundle.path, threads=threads, kernels=kernels, allow_bundle_code=self.allow_bundle_code)

    def _score(
        self,
        row: Row,
        reference: KeptReference,
        pieces: Windows,
        stage: tuple[int, int],
        on_progress: OnProgress,
    ) -> tuple[Row, bool]:
        """The row with its numbers, or with why it has none; and whether it failed."""
        from qwen_aot.engines.bundle.progress import ProgressEvent
        from qwen_aot.engines.verify.comparison import score

        def advance(done: int, total: int) -> None:
            on_progress(ProgressEvent(f"score {row.name}", *stage, done, total, POSITIONS))

        bundle = self.bundles[row.name]
        manifest = bundle.manifest
        try:
            with self._open(bundle) as generator:
                scored: Scored = score(
                    generator.engine, manifest.max_batch, reference, pieces.kinds, on_progress=advance
                )
                speed: Spread = _speed(generator, manifest)
        except DeployError as error:
            return replace(row, not_compared=str(error)), not isinstance(error, EngineMismatchError)
        return replace(row, scored=scored, speed=speed), False


def _row(name: str, bundle: Bundle, weight_bytes: int, not_compared: str | None) -> Row:
    manifest = bundle.manifest
    engine = manifest.engines.text
    facts = {
        "target": manifest.target,
        "precision": engine.precision,
        "quantization": dict(engine.quantization),
    }
    return Row(name, str(bundle.path), facts, weight_bytes, manifest.model.num_parameters, not_compared=not_compared)


def _window_length(asked: int | None, contexts: Mapping[str, int]) -> int:
    """Tokens of a window, which every bundle must hold.

    Raises:
        BundleError: a context is too short for any.
        click.UsageError: a context is shorter than what was asked for.
    """
    from qwen_aot.engines.verify.scores import SHORTEST_WINDOW

    shortest = min(contexts, key=lambda name: contexts[name])
    if contexts[shortest] < SHORTEST_WINDOW:
        raise BundleError(
            f"the context of {shortest} is {contexts[shortest]} tokens, and at least {SHORTEST_WINDOW} are scored at "
            "once: build it with a larger --max-context"
        )
    if asked is not None and asked > contexts[shortest]:
        raise click.UsageError(
            f"--window {asked} is longer than the context of {contexts[shortest]} tokens of {shortest}; give at most "
            "that"
        )
    return min(asked or WINDOW, contexts[shortest])


def _drawn(manifest: Manifest) -> list[int]:
    import numpy as np

    drawn: list[int] = np.random.default_rng(0).integers(0, manifest.model.vocab_size, RANDOM_TOKENS).tolist()
    return drawn


def _speed(generator: Generator, manifest: Manifest) -> Spread:
    from qwen_aot.runtime.measure.rounds import decode_rate

    half = manifest.max_context // 2
    return decode_rate(generator, min(PROMPT_TOKENS, half), min(GEN_TOKENS, half), ROUNDS)


def _with_layers(
    rows: Sequence[Row],
    loaded: Mapping[str, Bundle],
    checkpoint: Checkpoint,
    pieces: Windows,
    stage: tuple[int, int],
    on_progress: OnProgress,
) -> list[Row]:
    """Each compared bundle's row with the error behind its layers, or with why that can't be told."""
    import tempfile

    from qwen_aot.engines.bundle.progress import ProgressEvent
    from qwen_aot.engines.spec.precisions import judged_as
    from qwen_aot.engines.verify.layer_graphs import bound_for, compare_bundle_layers, marked_reference

    first, stages = stage
    prompt = pieces.token_ids[0][:LAYER_TOKENS].tolist()
    found = list(rows)
    with tempfile.TemporaryDirectory(prefix="qwen-aot-layers-") as folder:
        longest = max(bundle.manifest.max_context for bundle in loaded.values())
        on_progress(ProgressEvent("export the fp32 graph", first, stages))
        reference = marked_reference(checkpoint, Path(folder) / "reference", longest)
        on_progress(ProgressEvent("export the fp32 graph", first, stages, 1, 1))
        for index, row in enumerate(rows):
            if row.scored is None:
                continue
            name = f"layers of {row.name}"
            on_progress(ProgressEvent(name, first + 1 + index, stages))
            bundle = loaded[row.name]
            engine = bundle.manifest.engines.text
            try:
                report = compare_bundle_layers(
                    bundle.path,
                    bundle.manifest,
                    checkpoint,
                    prompt[: bundle.manifest.prefill_chunk],
                    bound_for(judged_as(engine.precision, engine.quantization)),
                    reference=reference,
                )
            except DeployError as error:
                found[index] = replace(row, no_layers=str(error))
            else:
                found[index] = replace(row, layers=report)
            on_progress(ProgressEvent(name, first + 1 + index, stages, 1, 1))
    return found
