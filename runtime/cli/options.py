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
FALLBACK_MAX_NEW_TOKENS = 256  # where neither the request nor generation_config.json bounds an answer

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


bundle_argument: Decorator = click.argument("bundle", type=GivenPath(exists=True))
json_option: Decorator = option("--json", "as_json", is_flag=True, help="One JSON object on stdout.", group="Output")
threads_option: Decorator = option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="CPU threads.  [default: one for each core that this process may use]",
    group="Machine",
)

_GENERATION = "Generation (defaults: the bundle's generation_config.json)"
_generation_options = (
    option(
        "--max-new-tokens",
        type=click.IntRange(1),
        help=f"Longest answer.  [default: the bundle's, or {FALLBACK_MAX_NEW_TOKENS}]",
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
        "--repetition-penalty",
        type=click.FloatRange(0, min_open=True),
        help="Above 1 makes seen tokens less likely.",
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
    if settings["max_new_tokens"] is UNSET and defaults.max_new_tokens is None:
        settings["max_new_tokens"] = FALLBACK_MAX_NEW_TOKENS
    return defaults.resolve(**settings)
