"""Opens what a user names as CHECKPOINT: a folder, a .gguf file, or a variant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_aot.errors import CheckpointError

if TYPE_CHECKING:
    from qwen_aot.exporter.checkpoint.base import Checkpoint
    from qwen_aot.exporter.model.config import ModelConfig


def open_source(name: str, *, random_weights: bool = False, seed: int = 0) -> Checkpoint:
    """Opens a checkpoint and compares its headers with its configuration, or makes a variant's from random weights.

    Raises:
        click.UsageError: a variant without `random_weights`, a path with it, or neither a path nor a variant.
        CheckpointError: a damaged checkpoint.
    """
    from qwen_aot.exporter.checkpoint.open import open_checkpoint
    from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
    from qwen_aot.exporter.weights.sources import check_headers

    if not name:
        raise click.UsageError("the checkpoint's name is empty (a variable that isn't set?); give a path")
    if Path(name).exists():
        if random_weights:
            raise click.UsageError(
                f"--random-weights goes with a variant's name, and {name} is a checkpoint; leave it out"
            )
        checkpoint = open_checkpoint(name)
        try:
            check_headers(checkpoint)
        except CheckpointError:
            checkpoint.close()
            raise
        return checkpoint
    variant, config = find_variant(name)
    if not random_weights:
        raise click.UsageError(
            f"{name} is a variant's name and has no weights: give a checkpoint's folder or .gguf file, or "
            "--random-weights for sizing and benchmarks"
        )
    return RandomCheckpoint(config, seed, variant)


def find_variant(name: str) -> tuple[str, ModelConfig]:
    """A variant's own name and its facts, for a name that no file has.

    Raises:
        click.UsageError: there is no such variant either.
    """
    from qwen_aot.exporter.model.variants import canonical_name, refusal_of, variant_config, variants_in_words

    variant = canonical_name(name)
    if variant is None and (refusal := refusal_of(name)) is not None:
        raise click.UsageError(refusal)
    if variant is None:
        raise click.UsageError(
            f"{name} doesn't exist and isn't a variant's name; accepted: a folder saved by transformers, a .gguf file, "
            f"or one of {variants_in_words()}"
        )
    return variant, variant_config(variant)
