"""Options that several verbs share, written once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_aot.errors import GenerationError
from qwen_aot.machine import MAX_THREADS
from qwen_aot.runtime.cli.command import option

if TYPE_CHECKING:
    from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

PLOT_SUFFIXES = (".png", ".svg")

Decorator = Callable[[Any], Any]


class GivenPath(click.Path):
    """A path that isn't empty: what an unset variable of a shell leaves would mean the current folder."""

    def __init__(self, *, exists: bool = False) -> None:
        super().__init__(exists=exists, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuses an empty text."""
        if value == "":
            self.fail("it is empty (a variable that isn't set?); give a path, or . for the current folder", param, ctx)
        return super().convert(value, param, ctx)


class PlotPath(GivenPath):
    """A file to write, of a kind that can be drawn, in a folder that is there."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuses what would fail after all the work."""
        path = super().convert(value, param, ctx)
        if path.suffix not in PLOT_SUFFIXES:
            self.fail(f"{path} isn't a {' or '.join(PLOT_SUFFIXES)} file", param, ctx)
        if path.is_dir():
            self.fail(f"{path} can't be written: it is a folder", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"{path} can't be written: there is no folder {path.parent}", param, ctx)
        return path


def _biases(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[int, float] | None:
    """Token id -> bias, from texts ID=VALUE; None: there are none."""
    biases: dict[int, float] = {}
    for text in texts:
        left, _, right = text.partition("=")
        try:
            token_id, bias = int(left), float(right)
        except ValueError:
            token_id, bias = -1, 0.0
        if token_id < 0 or not -100 <= bias <= 100:
            reason = f"{text!r} isn't a token id, = and a number of -100 to 100, such as 1234=-5"
            raise click.BadParameter(reason, ctx, param)
        if token_id in biases:
            raise click.BadParameter(f"it has the token id {token_id} twice; give each once", ctx, param)
        biases[token_id] = bias
    return biases or None


bundle_argument: Decorator = click.argument("bundle", type=GivenPath(exists=True))
json_option: Decorator = option("--json", "as_json", is_flag=True, help="One JSON object on stdout.", group="Output")
threads_option: Decorator = option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="CPU threads.  [default: one for each core that this process may use]",
    group="Machine",
)
kernels_option: Decorator = option(
    "--kernels",
    type=click.Choice(["auto", "own", "onnxruntime"]),
    help="Whose kernels run it on the CPU.  [default: auto, which is own where this machine has them]",
    group="Machine",
)
allow_special_tokens_option: Decorator = option(
    "--allow-special-tokens",
    is_flag=True,
    help="Special tokens spelled in a message are those tokens, not plain text.",
    group="Conversation",
)
allow_bundle_code_option: Decorator = option(
    "--allow-bundle-code",
    is_flag=True,
    help="Run native code that the bundle brings: of a TensorRT bundle by someone whose programs you would run.",
    group="Machine",
)

no_speculate_option: Decorator = option(
    "--no-speculate",
    "speculate",
    flag_value=False,
    default=True,
    help="Draft no tokens, though the bundle was built with --speculate.",
    group="Machine",
)

_GENERATION = "Generation (defaults: the bundle's generation_config.json)"
_generation_options = (
    option(
        "--max-new-tokens",
        type=click.IntRange(1),
        help="Longest answer.  [default: the bundle's; else the context's end for a chat, 1024 for other text]",
        group=_GENERATION,
    ),
    option(
        "--temperature",
        type=click.FloatRange(0),
        help="0 is greedy and turns penalties off unless given.",
        group=_GENERATION,
    ),
    option("--top-k", type=click.IntRange(0), help="Draw from this many likeliest tokens; 0: all.", group=_GENERATION),
    option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        help="Draw from the likeliest tokens that reach this probability together.",
        group=_GENERATION,
    ),
    option(
        "--min-p",
        type=click.FloatRange(0, 1),
        help="Draw from tokens at least this many times as likely as the likeliest; 0: all.",
        group=_GENERATION,
    ),
    option(
        "--repetition-penalty",
        type=click.FloatRange(0, min_open=True),
        help="Above 1 makes seen tokens less likely.",
        group=_GENERATION,
    ),
    option(
        "--presence-penalty",
        type=click.FloatRange(-2, 2),
        help="Taken from the logits of tokens that the answer has.",
        group=_GENERATION,
    ),
    option(
        "--frequency-penalty",
        type=click.FloatRange(-2, 2),
        help="Taken from a token's logit as often as the answer has it.",
        group=_GENERATION,
    ),
    option(
        "--logit-bias",
        multiple=True,
        callback=_biases,
        metavar="ID=VALUE",
        help="Add VALUE (-100 to 100) to a token's logit; may be given again.",
        group=_GENERATION,
    ),
    option("--seed", type=click.IntRange(0), help="For the same draws again.", group=_GENERATION),
    option("--stop", multiple=True, help="Text that ends the answer; may be given again.", group=_GENERATION),
    option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token.", group=_GENERATION),
)


def generation_options(command: Any) -> Any:
    """Adds the generation options; the command gets them as keyword arguments for `generation_config`."""
    for decorate in reversed(_generation_options):
        command = decorate(command)
    return command


def require_generation(given: Mapping[str, Any]) -> None:
    """Refuses wrong values of the generation options: what needs no bundle is found before one is loaded.

    Raises:
        click.UsageError: a value is out of range.
    """
    from qwen_aot.runtime.generation.config import GenerationConfig

    try:
        GenerationConfig(**{name: value for name, value in given.items() if value is not None})
    except GenerationError as error:
        raise click.UsageError(str(error)) from None


def generation_config(defaults: GenerationDefaults, given: Mapping[str, Any]) -> GenerationConfig:
    """A request's settings from the options; what wasn't given is the bundle's."""
    from qwen_aot.runtime.generation.config import UNSET

    settings = {name: UNSET if value is None or value == () else value for name, value in given.items()}
    return defaults.resolve(**settings)
