"""Opens what a user names as BUNDLE, and says meanwhile that it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_aot.runtime.cli.console import busy

if TYPE_CHECKING:
    from qwen_aot.runtime.generation.generator import Generator


def open_generator(
    bundle: Path,
    *,
    threads: int | None,
    kernels: str | None,
    allow_bundle_code: bool = False,
    speculate: bool = True,
) -> Generator:
    """A bundle's generator: every verb that runs one gets it here.

    Raises:
        BundleError: the bundle is damaged.
        EngineMismatchError: this machine can't run it.
    """
    from qwen_aot.runtime.generation.generator import Generator

    with busy(f"loading {bundle}"):  # it redraws itself over whatever is typed, so it ends before a conversation
        return Generator.open(
            bundle, threads=threads, kernels=kernels, allow_bundle_code=allow_bundle_code, speculate=speculate
        )
