"""The PTX of compiled kernels, found by the image that a driver is given, and executed in its place.

A cubin is machine code, which nothing here executes. What is executed is the PTX that it was assembled from: the file
that `plugins.aot` left beside it, once NVIDIA's assembler has made the very same cubin of it again. So another kernel's
PTX, or that of another build, is refused whatever the records say.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.plugins.ptx.assembler import assemble
from tests.plugins.ptx.interpreter import Counts, Interpreter, Module, Range


class CompiledKernels:
    """Executes launches of images."""

    def __init__(self, interpreter: Path, kernels: Path) -> None:
        """Takes the library `interpreter` of tests/plugins/ptx, and the folder that `plugins.aot` wrote."""
        self._interpreter = Interpreter(interpreter)
        self._kernels = kernels
        self._modules: dict[bytes, Module] = {}  # by image

    def module(self, image: bytes, target: str, entry: dict[str, Any]) -> Module:
        """What is executed for an image.

        Args:
            image: A cubin or PTX text.
            target: "sm_89", or "ptx".
            entry: Of the manifest, whose file the image is.

        Raises:
            AssertionError: The PTX beside the image isn't what it was made of.
        """
        if image not in self._modules:
            name = entry["name"]
            text = (self._kernels / target / f"{name}.ptx").read_bytes()
            made = text if target == "ptx" else assemble(text, target)
            assert made == image, f"{name} of {target}: the PTX beside it isn't what it was assembled from"
            self._modules[image] = self._interpreter.load(text.decode())
        return self._modules[image]

    def launch(
        self,
        image: bytes,
        target: str,
        entry: dict[str, Any],
        *,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        parameters: Any,
        ranges: Iterable[Range],
    ) -> Counts:
        """Executes a launch.

        Raises:
            PtxError: What the kernel may not do.
            AssertionError: As in `module`.
        """
        module = self.module(image, target, entry)
        return module.launch(
            entry["symbol"],
            grid=grid,
            threads=threads,
            parameters=parameters,
            ranges=ranges,
            shared_bytes=shared_bytes,
        )
