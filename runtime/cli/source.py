"""Opens what a user names as CHECKPOINT: a folder, a .gguf file, or a variant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from exporter.checkpoint.base import Checkpoint


def open_source(name: str, *, random_weights: bool = False, seed: int = 0) -> Checkpoint:
    """Opens a checkpoint, or makes a variant's from random weights.

    Raises:
        click.UsageError: a variant without `random_weights`, or a path with it.
        CheckpointError: neither a checkpoint nor a variant.
    """
    from exporter.variants import find_variant

    from exporter.checkpoint import open_checkpoint

    if Path(name).exists():
        if random_weights:
            raise click.UsageError(
                f"--random-weights goes with a variant's name, and {name} is a checkpoint; leave it out"
            )
        return open_checkpoint(Path(name))
    variant = find_variant(name)
    if not random_weights:
        raise click.UsageError(
            f"{name} is a variant's name and has no weights: give a checkpoint's folder or .gguf file, or "
            "--random-weights for sizing and benchmarks"
        )
    from exporter.checkpoint.random import RandomCheckpoint

    return RandomCheckpoint(variant.config, seed)
