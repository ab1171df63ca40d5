"""What TensorRT says, kept, and its errors in a user's words.

TensorRT gives no codes that tell these cases apart (one for all of its compiler, `Error Code 1: Myelin`), so they are
told apart by its text. The text is always part of the message.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Protocol

from qwen_aot.errors import BuildError

logger = logging.getLogger(__name__)

# Said of every build, and nothing that a user could act on: our inputs are of int64 on purpose.
_NOISE = re.compile(r"Make sure input \S+ has Int64 binding")
# Said after any other error on a machine without a driver.
_NO_DRIVER = re.compile(r"CUDA driver version is insufficient|no CUDA-capable device|CUDA initialization failure")

# Said of each profile once it is compiled, with a GPU or without, at level VERBOSE.
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")

# What the text holds -> what happened; what to change. The first that is found counts.
_EXPLANATIONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), text)
    for pattern, text in (
        (
            r"out ?of ?memory|bad_alloc|MEM_ALLOC_FAILED|memory allocation|failed to allocate",
            "it ran out of memory; close other programs, ask for less with --max-batch, --prefill-chunk or "
            "--max-context, or build on a larger machine",
        ),
        (
            r"within workspace limit|insufficient workspace",
            "no kernel works within the workspace limit; raise --workspace-mib or leave it out",
        ),
        (
            r"Cannot compile for target\(s\) (?P<what>\S+?), because the model contains HW-specific datatypes: \S+",
            "a data type of this precision doesn't exist on {what}; leave that compute capability out or choose "
            "another precision",
        ),
        (
            r"qwen_aot Qwen\w+: no kernels for SM (?P<what>[\d.]+)",
            "the plugin library has no kernels for this GPU; build it with `python -m qwen_aot.plugins.library "
            "--sm {what}`, or for all GPUs without --sm",
        ),
        (
            r"qwen_aot Qwen\w+: (?P<what>[^|]+?) *(?:\||$)",
            "a plugin refused: {what}",
        ),
        (
            r"plugin not found|no importer registered|getPluginCreator",
            "the graph has an op that it doesn't know and no plugin for it is loaded; a newer version may know it",
        ),
        (
            r"could not find any implementation for node (?P<what>[^\s.]+)",
            "it has no kernel for {what} on this GPU; raise --workspace-mib and --optimization-level, or choose "
            "another precision",
        ),
        (
            r"not supported by a dedicated kernel",
            "it has no attention kernel for this head size and precision; choose another precision",
        ),
        (
            r"unable to load library:? (?P<what>[^\s:]+)",
            "its library {what} isn't installed; install the whole package again",
        ),
        (
            r"verifying IR|MyelinCheckException|internal error",
            "its compiler failed on this graph; another precision may pass; please report it",
        ),
        (
            r"compiled with|different version|version (mis)?match|serialization version",
            "a file was written by another version of it; delete the file or name another one",
        ),
    )
)
_NO_DRIVER_TEXT = "it needs a GPU and its driver, and this machine has none; build on a machine that has them"


class Messages(Protocol):
    """A logger that keeps what it was told.

    Attributes:
        errors, warnings: texts.
        activation_bytes: scratch memory of each profile that was compiled.
    """

    errors: list[str]
    warnings: list[str]
    activation_bytes: list[int]

    def clear(self) -> None:
        """Forgets everything, for the next step of a build."""


def make_logger(trt: Any) -> Any:
    """An `ILogger` that is also `Messages`. TensorRT keeps one logger for all of a process's live objects."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.clear()

        def clear(self) -> None:
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.activation_bytes: list[int] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                if not _NOISE.search(message):
                    self.warnings.append(message)
            else:
                if found := _ACTIVATIONS.search(message):
                    self.activation_bytes.append(int(found[1]))
                logger.debug("%s", message)

    return Logger()


def failure(title: str, doing: str, errors: list[str]) -> BuildError:
    """The error for a step that failed.

    Args:
        title: the library and its version.
        doing: what it couldn't do.
        errors: what it said.
    """
    said = [text for text in errors if not _NO_DRIVER.search(text)] or errors
    text = " | ".join(line.strip() for line in said) or "nothing"
    for pattern, explanation in _EXPLANATIONS:
        if match := pattern.search(text):
            meaning = explanation.format_map(match.groupdict())
            break
    else:
        meaning = _NO_DRIVER_TEXT if _NO_DRIVER.search(text) else "qwen-aot doesn't know this error; please report it"
    return BuildError(f"{title} couldn't {doing}: {meaning}. It said: {text}")
