"""The two TensorRT libraries, one Python API under two names, and everything in which they differ: one row each.

Plain data for the builder, the backend and `doctor`. What TensorRT-RTX refuses was tried with 1.7.1 on a machine
without a GPU; the reasons are in the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from qwen_aot.extras import install_command

__all__ = ["FLAVOURS", "Flavour", "flavour_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """One library.

    Attributes:
        target: the target that it builds for, and the extra of this project that brings it.
        title: its name.
        module: what Python imports.
        package: what pip installs.
        suffix: of its engine files.
        install_version: brings one version of it to a device, with the place for that version.
        at_least: the oldest version that has what the builder uses.
        cuda_at_least: the oldest CUDA whose Python bindings run its engines.
        default_capabilities: the GPUs built for when none are named. Empty: it builds for the GPU it runs on.
        builds_for_others: it builds engines for GPUs that aren't there.
        captures_graphs: the library captures CUDA graphs itself, if asked through its runtime configuration. It
            compiles kernels for a shape while slower ones already run; a graph captured from outside would keep the
            slow ones for good. Source: TensorRT-RTX's documentation, "Working with RTX CUDA Graphs".
        compiles_on_device: an engine's kernels are compiled where it runs, and its contexts take a runtime
            configuration, which can hold a cache of them. Source: the same, "Working with Runtime Cache".
        has_plugins: whether the project's plugins compute attention and experts unless asked otherwise.
        refused: options of a build that it doesn't have, with the reason and what to do.
    """

    target: str
    title: str
    module: str
    package: str
    suffix: str
    install_version: str
    at_least: tuple[int, ...]
    cuda_at_least: tuple[int, ...]
    default_capabilities: tuple[str, ...]
    builds_for_others: bool
    captures_graphs: bool
    compiles_on_device: bool
    has_plugins: bool
    refused: Mapping[str, str]

    @property
    def install(self) -> str:
        """The command that brings a version that fits, with what else the target needs; see `extras.obstacle`."""
        return install_command(self.target)

    @property
    def oldest(self) -> str:
        """`at_least` as a version is written, "10.3" for example."""
        return ".".join(map(str, self.at_least))


FLAVOURS: Mapping[str, Flavour] = {
    flavour.target: flavour
    for flavour in (
        Flavour(
            target="tensorrt-rtx",
            title="TensorRT-RTX",
            module="tensorrt_rtx",
            package="tensorrt-rtx-cu13",
            suffix=".rtx",
            install_version="pip install tensorrt-rtx-cu13=={version}",
            at_least=(1, 7),
            cuda_at_least=(13,),
            default_capabilities=("8.6", "8.9", "12.0"),  # RTX 30, 40 and 50
            builds_for_others=True,
            captures_graphs=True,
            compiles_on_device=True,
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
            package="tensorrt",
            suffix=".plan",
            install_version="pip install tensorrt=={version}",
            at_least=(10, 3),  # of JetPack 6; with the plugins, which need no layer of a later one
            cuda_at_least=(12, 6),  # of the same
            default_capabilities=(),
            builds_for_others=False,
            captures_graphs=False,
            compiles_on_device=False,
            has_plugins=True,
            refused={
                "compute_capabilities": "it builds for the GPU that it runs on; build there, or use "
                "--hardware-compatible",
            },
        ),
    )
}


def flavour_of(engine: str) -> Flavour | None:
    """The flavour that an engine file's name belongs to; None: neither."""
    suffix = PurePosixPath(engine).suffix
    return next((flavour for flavour in FLAVOURS.values() if flavour.suffix == suffix), None)
