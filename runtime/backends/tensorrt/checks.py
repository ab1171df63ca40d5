"""Whether a machine can run a TensorRT bundle, asked before anything of it is allocated."""

from __future__ import annotations

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.backends.cuda.runtime import Device
from qwen_aot.runtime.bundle.flavours import flavour_of
from qwen_aot.runtime.bundle.manifest import EngineEntry, Manifest, TensorRtFacts

__all__ = ["check_device", "tensorrt_facts"]

_OLDEST_COMPATIBLE = (8, 0)  # Ampere: where hardware-compatible engines begin


def tensorrt_facts(engine: EngineEntry) -> TensorRtFacts:
    """The TensorRT section of an engine's entry in the manifest, with its weights inside the engine.

    Raises:
        EngineMismatchError: there is no section, or no weights.
    """
    facts = engine.tensorrt
    if facts is None:
        raise EngineMismatchError(
            f"the bundle's engine is {engine.file!r}, but its manifest has no `tensorrt` section; rebuild it"
        )
    if not facts.has_weights:
        raise EngineMismatchError(
            "the bundle's engine was built without its weights (--strip-weights), and this runtime doesn't refit "
            "engines: refit it with TensorRT's Refitter and the checkpoint's weights, or rebuild the bundle without "
            "--strip-weights"
        )
    return facts


def check_device(manifest: Manifest, facts: TensorRtFacts, device: Device) -> None:
    """The GPU is one of those that the engine was built for, and has room for it.

    Raises:
        EngineMismatchError: says what was found, what is accepted and what to do.
    """
    _check_capability(manifest, facts, device)
    _check_memory(manifest, facts, device)


def _check_capability(manifest: Manifest, facts: TensorRtFacts, device: Device) -> None:
    """An engine that names no capability belongs to the GPU that built it: TensorRT itself checks that."""
    if facts.hardware_compatible:
        major, minor = (int(part) for part in device.compute_capability.split("."))
        is_accepted = (major, minor) >= _OLDEST_COMPATIBLE or device.compute_capability in facts.compute_capabilities
        accepted = ".".join(map(str, _OLDEST_COMPATIBLE)) + " and later"
    else:
        is_accepted = not facts.compute_capabilities or device.compute_capability in facts.compute_capabilities
        accepted = ", ".join(facts.compute_capabilities)
    if not is_accepted:
        flavour = flavour_of(manifest.engines.text.file)
        builds_for_others = flavour is not None and flavour.builds_for_others
        remedy = f"with --compute-capability {device.compute_capability}" if builds_for_others else "on this machine"
        raise EngineMismatchError(
            f"the GPU {device.name} has compute capability {device.compute_capability}; the bundle's engine runs on "
            f"{accepted}. Use another GPU (CUDA_VISIBLE_DEVICES), or rebuild the bundle {remedy}"
        )


def _check_memory(manifest: Manifest, facts: TensorRtFacts, device: Device) -> None:
    needed = facts.weight_bytes + facts.cache_bytes + facts.activation_bytes
    if needed > device.free_bytes:
        source = "estimated" if facts.builder_activation_bytes is None else "as TensorRT told when it was built"
        raise EngineMismatchError(
            f"the GPU {device.name} has {_mib(device.free_bytes)} of {_mib(device.total_bytes)} free, and the bundle "
            f"needs about {_mib(needed)}: weights {_mib(facts.weight_bytes)}, cache {_mib(facts.cache_bytes)} "
            f"({manifest.max_batch} rows of {manifest.max_context} tokens), activations "
            f"{_mib(facts.activation_bytes)} ({source}). End other programs that use the GPU, or rebuild "
            "the bundle with a smaller --max-context or --max-batch, or a smaller --precision"
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
