"""What a build may ask of each TensorRT library, and what it gets: functions over `runtime.bundle.flavours`."""

from __future__ import annotations

from qwen_aot.engines.spec.precisions import PRECISIONS
from qwen_aot.engines.spec.tensorrt_options import DEFAULT_OPTIONS, Form, TensorRtOptions
from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.flavours import FLAVOURS, Flavour


def check_options(flavour: Flavour, options: TensorRtOptions, precision: str) -> None:
    """Refuses what the library can't do, without asking it.

    Raises:
        BuildError: names the option or the compute capability, and the remedy.
    """
    for name, reason in flavour.refused.items():
        if getattr(options, name) != getattr(DEFAULT_OPTIONS, name):
            raise BuildError(f"target {flavour.target} doesn't take {name}: {reason}")
    for name in ("attention", "moe", "linear"):
        if getattr(options, name) == "plugin" and not flavour.has_plugins:
            raise BuildError(
                f"target {flavour.target} doesn't take {name} plugin: {flavour.title} has no plugin layers; leave it "
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


def form_of(flavour: Flavour, asked: Form | None) -> Form:
    """Who computes attention or experts, "plugin" or "native": as asked for, or the library's default."""
    return asked or ("plugin" if flavour.has_plugins else "native")


def capabilities_of(flavour: Flavour, options: TensorRtOptions, precision: str) -> tuple[str, ...]:
    """The GPUs to build for, in ascending order: those asked for, or the default ones that have the precision."""
    lowest = PRECISIONS[precision].lowest_capability
    default = (name for name in flavour.default_capabilities if capability(name) >= capability(lowest))
    return tuple(sorted(options.compute_capabilities or default, key=capability))


def capability(name: str) -> tuple[int, int]:
    """Major and minor of "12.0", which compare as they should."""
    major, minor = name.split(".")
    return int(major), int(minor)
