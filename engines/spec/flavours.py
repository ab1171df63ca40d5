"""The two libraries that build TensorRT engines, and everything in which they differ: one row each.

What TensorRT-RTX refuses was tried with 1.7.1 on a machine without a GPU; the reasons are in the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_aot.engines.spec.precisions import PRECISIONS
from qwen_aot.engines.spec.tensorrt_options import DEFAULT_OPTIONS, Form, TensorRtOptions
from qwen_aot.errors import BuildError


@dataclass(frozen=True, slots=True)
class Flavour:
    """One library.

    Attributes:
        target: the target that it builds for.
        title: its name.
        module: what Python imports.
        install: the command that brings it.
        at_least: the oldest version that has what the builder uses.
        default_capabilities: the GPUs built for when none are named. Empty: it builds for the GPU it runs on.
        has_plugins: whether the project's plugins compute attention and experts unless asked otherwise.
        refused: options that it doesn't have, with the reason and what to do.
    """

    target: str
    title: str
    module: str
    install: str
    at_least: tuple[int, ...]
    default_capabilities: tuple[str, ...]
    has_plugins: bool
    refused: Mapping[str, str]

    def check(self, options: TensorRtOptions, precision: str) -> None:
        """Refuses what this library can't do, without asking it.

        Raises:
            BuildError: names the option or the compute capability, and the remedy.
        """
        for name, reason in self.refused.items():
            if getattr(options, name) != getattr(DEFAULT_OPTIONS, name):
                raise BuildError(f"target {self.target} doesn't take {name}: {reason}")
        for name in ("attention", "moe"):
            if getattr(options, name) == "plugin" and not self.has_plugins:
                raise BuildError(
                    f"target {self.target} doesn't take {name} plugin: {self.title} has no plugin layers; leave it "
                    "out, or choose a target that has them: "
                    + ", ".join(other.target for other in FLAVOURS.values() if other.has_plugins)
                )
        lowest = PRECISIONS[precision].lowest_capability
        too_old = [name for name in options.compute_capabilities if capability(name) < capability(lowest)]
        if too_old:
            raise BuildError(
                f"{precision} needs compute capability {lowest} or later, and {', '.join(too_old)} is asked for; "
                "leave it out or choose another precision"
            )

    def form(self, asked: Form | None) -> Form:
        """Who computes attention or experts, "plugin" or "native": as asked for, or the library's default."""
        return asked or ("plugin" if self.has_plugins else "native")

    def capabilities(self, options: TensorRtOptions, precision: str) -> tuple[str, ...]:
        """The GPUs to build for, in ascending order: those asked for, or the default ones that have the precision."""
        lowest = PRECISIONS[precision].lowest_capability
        default = (name for name in self.default_capabilities if capability(name) >= capability(lowest))
        return tuple(sorted(options.compute_capabilities or default, key=capability))


FLAVOURS: Mapping[str, Flavour] = {
    flavour.target: flavour
    for flavour in (
        Flavour(
            target="tensorrt-rtx",
            title="TensorRT-RTX",
            module="tensorrt_rtx",
            install="pip install 'qwen-aot[tensorrt-rtx]'",
            at_least=(1, 7),
            default_capabilities=("8.6", "8.9", "12.0"),  # RTX 30, 40 and 50
            has_plugins=False,
            refused={
                "timing_cache": "it times no kernels when it builds (its cache is made on the device); leave it out",
                "hardware_compatible": "its engines run on every GPU that they name; name them with "
                "--compute-capability",
                "version_compatible": "the lean runtime, which such engines need, isn't part of it; build again for "
                "another version",
                "strip_weights": "it compiles refittable engines with a GPU only; leave it out",
                "plugin_library": "it has no plugin layers; leave it out",
            },
        ),
        Flavour(
            target="tensorrt",
            title="TensorRT",
            module="tensorrt",
            install="pip install 'qwen-aot[tensorrt]'",
            at_least=(10, 13),
            default_capabilities=(),
            has_plugins=True,
            refused={
                "compute_capabilities": "it builds for the GPU that it runs on; build there, or use "
                "--hardware-compatible",
            },
        ),
    )
}


def capability(name: str) -> tuple[int, int]:
    """Major and minor of "12.0", which compare as they should."""
    major, minor = name.split(".")
    return int(major), int(minor)
