"""Loads TensorRT or TensorRT-RTX when a build needs it, and says what it has. Both have one Python API."""

from __future__ import annotations

import importlib
import re
from typing import Any

from qwen_aot.engines.spec.flavours import capability
from qwen_aot.errors import BuildError
from qwen_aot.extras import how_to_install
from qwen_aot.runtime.bundle.flavours import Flavour


def load(flavour: Flavour) -> Any:
    """The library's module.

    Raises:
        BuildError: it isn't installed, can't be loaded, or is too old; names the command that brings it.
    """
    try:
        module = importlib.import_module(flavour.module)
    except (ImportError, OSError) as error:  # OSError: the bindings are there, the libraries aren't
        raise BuildError(
            f"target {flavour.target} needs {flavour.title}, and it can't be loaded ({error}); "
            f"{how_to_install(flavour.target)}"
        ) from error
    found = tuple(int(number) for number in re.findall(r"\d+", module.__version__)[: len(flavour.at_least)])
    if found < flavour.at_least:
        raise BuildError(
            f"target {flavour.target} needs {flavour.title} {flavour.oldest} or later, and {module.__version__} is "
            f"installed; {how_to_install(flavour.target, upgrade=True)}"
        )
    return module


def known_capabilities(trt: Any) -> tuple[str, ...]:
    """The GPUs that the library can build for without having them, "8.9" for example, in ascending order."""
    members = (re.fullmatch(r"SM(\d+)(\d)", name) for name in dir(trt.ComputeCapability))
    return tuple(sorted((f"{match[1]}.{match[2]}" for match in members if match is not None), key=capability))


def require_capabilities(trt: Any, flavour: Flavour, names: tuple[str, ...]) -> None:
    """Refuses GPUs that the library doesn't know.

    Raises:
        BuildError: names those that it knows.
    """
    if not names:
        return
    known = known_capabilities(trt)
    if unknown := [name for name in names if name not in known]:
        raise BuildError(
            f"{flavour.title} {trt.__version__} can't build for compute capability {', '.join(unknown)}; it can for "
            f"{', '.join(known)}"
        )


# What TensorScatter, RotaryEmbedding and Attention become; TensorRT has all of them from 10.15 on.
_STANDARD_LAYERS = ("KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "ATTENTION_INPUT")


def require_standard_layers(trt: Any, flavour: Flavour) -> None:
    """Refuses a library that can't hold a graph of the standard lowering, before anything is traced.

    Raises:
        BuildError: names the layers that it lacks.
    """
    if lacks := [name for name in _STANDARD_LAYERS if not hasattr(trt.LayerType, name)]:
        raise BuildError(
            f"{flavour.title} {trt.__version__} lacks the layers {', '.join(lacks)} of this graph, which TensorRT has "
            f"from 10.15 on; {how_to_install(flavour.target, upgrade=True)}, or leave out --attention native"
        )


def capability_member(trt: Any, name: str) -> Any:
    """The library's member for "8.9": `ComputeCapability.SM89`."""
    return getattr(trt.ComputeCapability, f"SM{name.replace('.', '')}")
