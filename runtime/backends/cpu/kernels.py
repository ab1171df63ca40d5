"""The project's own CPU kernels as the runtime meets them: where their library is, and whether a bundle runs by them.

The library is this machine's own, never the bundle's: compiled into the installed package (`qwen_aot.plugins.cpu`), or
named in QWEN_AOT_CPU_KERNELS (docs/cpu-kernels.md).
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_aot.errors import EngineMismatchError, GenerationError
from qwen_aot.runtime.bundle.load import Bundle
from qwen_aot.runtime.bundle.manifest import KernelGraph, Manifest
from qwen_aot.str_enum import StrEnum

__all__ = [
    "INSTRUCTIONS_VARIABLE",
    "LIBRARY_VARIABLE",
    "OPS_VERSION",
    "CpuLibrary",
    "Kernels",
    "LackingInstructionsError",
    "choose_kernels",
    "find_library",
    "kernels_named",
    "kernels_of",
    "open_library",
    "require_library",
    "why_not_by_default",
]

logger = logging.getLogger(__name__)

LIBRARY_VARIABLE = "QWEN_AOT_CPU_KERNELS"  # of the environment: the library's path
INSTRUCTIONS_VARIABLE = "QWEN_AOT_CPU_INSTRUCTIONS"  # read by the library; which its kernels use
FILE_NAME = "libqwen_aot_cpu.so"
OPS_VERSION = 2  # of the ops' interface: what the library and the bundle's graph must have
# ONNX Runtime's kernels are faster than those of one value at a time; neon hasn't run on hardware, and nobody knows.
# The C library names the same (runtime/capi/src/engine/kernels_library.cpp).
_SLOW_INSTRUCTIONS = ("portable", "neon")

_PACKAGE = Path(__file__).parents[3]  # qwen_aot, or the repository, whose folders are its parts
_BUILD_IT = (
    "compile it with `python -m qwen_aot.plugins.cpu.build` (a C++ compiler is all that it needs), or name one in "
    f"{LIBRARY_VARIABLE}"
)
_TEXT_BYTES = 512


class LackingInstructionsError(EngineMismatchError):
    """The environment wants instructions that this CPU lacks: nothing takes their place."""


class Kernels(StrEnum):
    """Whose kernels run a bundle on the CPU."""

    AUTO = "auto"  # own where they can and are faster, else ONNX Runtime's
    OWN = "own"
    ONNXRUNTIME = "onnxruntime"


@dataclass(frozen=True, slots=True)
class CpuLibrary:
    """The library, loaded into this process.

    Attributes:
        path: of the file.
        version: of the ops' interface.
        instructions: what its kernels use on this CPU, "avx512_vnni" for example.
    """

    path: Path
    version: int
    instructions: str


def kernels_named(name: str | None) -> Kernels:
    """The choice of this name; None: the default.

    Raises:
        GenerationError: there is none; lists those there are.
    """
    try:
        return Kernels.AUTO if name is None else Kernels(name)
    except ValueError:
        raise GenerationError(f"kernels is {name!r}; accepted: {', '.join(Kernels)}") from None


def find_library() -> Path | None:
    """Where this machine's library should be: what the environment names, else the installed package's; None: nowhere.

    A path that the environment names is given whether a file is there or not: whoever named it wants that one.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named).resolve()
    path = _PACKAGE / "plugins" / "cpu" / "lib" / FILE_NAME
    return path.resolve() if path.is_file() else None


def open_library(path: Path) -> CpuLibrary:
    """Loads the library and asks it what it is. It stays loaded for the process's life.

    Raises:
        LackingInstructionsError: the environment wants instructions of it that this CPU lacks.
        EngineMismatchError: there is no such file, it isn't the library, it is for another processor, or it is of
            another version.
    """
    if not path.is_file():
        raise EngineMismatchError(f"there is no library of own CPU kernels at {path}: {_BUILD_IT}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineMismatchError(
            f"the library of own CPU kernels {path} can't be loaded: {error}. It may be for another processor "
            f"or another system: {_BUILD_IT}"
        ) from error
    try:
        version_of, instructions_of = library.qwen_aot_cpu_version, library.qwen_aot_cpu_instructions
    except AttributeError as error:
        raise EngineMismatchError(
            f"{path} isn't the library of own CPU kernels, or is an older one: it has no function "
            f"qwen_aot_cpu_version or qwen_aot_cpu_instructions; {_BUILD_IT}"
        ) from error
    version_of.restype = instructions_of.restype = ctypes.c_int32
    version = version_of()
    if version != OPS_VERSION:
        raise EngineMismatchError(
            f"the library of own CPU kernels {path} has version {version} of the ops, this qwen-aot has "
            f"{OPS_VERSION}: {_BUILD_IT}"
        )
    instructions_of.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    failed = instructions_of(text, _TEXT_BYTES)
    told = text.value.decode("utf-8", "replace")
    if failed:
        raise LackingInstructionsError(f"own CPU kernels can't run: {told}")
    return CpuLibrary(path, version, told)


def choose_kernels(
    bundle: Bundle, kernels: Kernels, register: Callable[[CpuLibrary], None]
) -> tuple[Bundle, CpuLibrary | None]:
    """The bundle as it is to be run, and the library that its graph needs. The C library chooses alike.

    Args:
        bundle: with both graphs, or ONNX Runtime's alone.
        kernels: what is wanted.
        register: offers the library's ops to ONNX Runtime. EngineMismatchError: it can't have them.

    Returns:
        By own kernels the bundle whose engine is the graph for them, and the library; by ONNX Runtime's the same
        bundle, and None.

    Raises:
        EngineMismatchError: own kernels are asked for and can't be had; or the environment names a library that isn't
            there or doesn't fit, or instructions that this CPU lacks.
    """
    if kernels is Kernels.ONNXRUNTIME:
        return bundle, None
    graph = bundle.manifest.engines.text.kernels
    if graph is None:
        if kernels is Kernels.OWN:
            raise EngineMismatchError(
                f"the bundle {bundle.path} has no graph for own CPU kernels: {_why_none(bundle)}. Let kernels be auto "
                "or onnxruntime, or build it anew"
            )
        logger.debug("the bundle has no graph for own CPU kernels: ONNX Runtime's are used")
        return bundle, None
    try:
        _require_graph(graph)
        library = require_library()
        if kernels is Kernels.AUTO and (why := why_not_by_default(library)) is not None:
            logger.debug("ONNX Runtime's kernels are used: %s", why)
            return bundle, None
        register(library)
    except LackingInstructionsError:
        raise
    except EngineMismatchError as error:
        # Whoever names a library wants it, as with `own`.
        if kernels is Kernels.OWN or os.environ.get(LIBRARY_VARIABLE):
            raise
        logger.debug("ONNX Runtime's kernels are used: %s", error)
        return bundle, None
    logger.debug("own kernels of %s are used (%s)", library.path, library.instructions)
    engines = bundle.manifest.engines
    text = engines.text.for_kernels()
    return replace(bundle, manifest=replace(bundle.manifest, engines=replace(engines, text=text))), library


def why_not_by_default(library: CpuLibrary) -> str | None:
    """Why `auto` leaves a library that fits; None: it doesn't."""
    if library.instructions not in _SLOW_INSTRUCTIONS or os.environ.get(INSTRUCTIONS_VARIABLE):
        return None
    return f"own ones would use {library.instructions} here, which isn't known to be faster"


def kernels_of(manifest: Manifest) -> str | None:
    """Whose kernels run an engine of this manifest: "own" or "onnxruntime"; None: they are compiled into it."""
    text = manifest.engines.text
    if text.tensorrt is not None:
        return None
    is_own = text.kernels is not None and text.file == text.kernels.file
    return str(Kernels.OWN if is_own else Kernels.ONNXRUNTIME)


def require_library() -> CpuLibrary:
    """This machine's library, loaded, of the version that this qwen-aot has.

    Raises:
        EngineMismatchError: there is none, or see `open_library`.
    """
    path = find_library()
    if path is None:
        raise EngineMismatchError(f"this machine has no library of own CPU kernels: {_BUILD_IT}")
    return open_library(path)


def _require_graph(graph: KernelGraph) -> None:
    if graph.version != OPS_VERSION:
        raise EngineMismatchError(
            f"the bundle's graph for own CPU kernels wants version {graph.version} of the ops, this qwen-aot has "
            f"{OPS_VERSION}: build the bundle anew"
        )


def _why_none(bundle: Bundle) -> str:
    if bundle.manifest.target != "cpu":
        return f"its target is {bundle.manifest.target}"
    if bundle.manifest.engines.text.quantization.get("fast_prefill"):
        return "--fast-prefill builds have none"
    return "an older version built it, or none of its nodes has such a kernel"
