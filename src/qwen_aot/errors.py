"""The one error tree, importable by every package (standard library only), and what ONNX Runtime raises.

    DeployError                  anything a user can act on; the CLI prints it without a traceback, exit code 1
    ├── CheckpointError          the checkpoint (or its config, tokenizer, tensors) is wrong or not supported
    ├── ExportError              the graph can't be traced, lowered or checked
    ├── BuildError               the engine or the bundle can't be made (space, memory, unsupported combination)
    ├── BundleError              a bundle is damaged, incomplete or of another format version
    │   └── EngineMismatchError  the bundle is sound but this machine or library can't run it
    ├── SettingsError            (`runtime.server.settings`) no server is started with these settings
    └── GenerationError          a request or a step failed at run time
        ├── ConstraintError      an output can't go on as its constraint asks
        ├── ContextFullError     the sequence doesn't fit the engine's context
        ├── QueueFullError       a service has as many requests waiting as it may: try again later
        ├── ServiceClosedError   a service was closed or drained, or its worker failed (then it has a cause)
        └── NonFiniteLogitsError (`runtime.engine.protocol`) names the rows whose logits hold NaN or Inf

A message says what was wrong, the value seen, what is accepted and what to do.
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "BundleError",
    "CheckpointError",
    "ConstraintError",
    "ContextFullError",
    "DeployError",
    "EngineMismatchError",
    "ExportError",
    "GenerationError",
    "QueueFullError",
    "ServiceClosedError",
    "onnxruntime_errors",
]


class DeployError(Exception):
    """Base of every error that a user can act on."""


class CheckpointError(DeployError):
    """The checkpoint, its configuration, tokenizer or tensors are wrong or not supported."""


class ExportError(DeployError):
    """The graph can't be traced, lowered or checked."""


class BuildError(DeployError):
    """The engine or the bundle can't be made."""


class BundleError(DeployError):
    """A bundle is damaged, incomplete or of a format version this runtime doesn't read."""


class EngineMismatchError(BundleError):
    """The bundle is sound, but this machine or library can't run it."""


class GenerationError(DeployError):
    """A request or a step failed at run time."""


class ConstraintError(GenerationError):
    """An output can't go on as its constraint asks."""


class ContextFullError(GenerationError):
    """The sequence doesn't fit the engine's context."""


class QueueFullError(GenerationError):
    """A service has as many requests waiting as it may."""


class ServiceClosedError(GenerationError):
    """A service takes no more requests: it was closed or drained, or its worker failed."""


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Every class that ONNX Runtime raises (they have no base of their own); imports it."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def is_panic(error: BaseException) -> bool:
    """Whether an extension in Rust gave up (tokenizers does on some damaged files): PyO3's is no Exception."""
    return type(error).__name__ == "PanicException"
