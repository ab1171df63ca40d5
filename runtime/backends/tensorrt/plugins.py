"""The plugin library that a bundle's engine needs, checked before TensorRT loads it: it is code."""

from __future__ import annotations

from pathlib import Path

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.bundle.load import Bundle, file_sha256
from qwen_aot.runtime.bundle.manifest import TensorRtFacts

__all__ = ["plugin_library"]


def plugin_library(bundle: Bundle, facts: TensorRtFacts) -> Path | None:
    """The bundle's library, to be loaded before its engine; None: there is none, or the engine holds it.

    Its SHA-256 is checked however large it is, and whether or not the bundle's files were.

    Raises:
        EngineMismatchError: it isn't the library that the engine was built with.
    """
    if facts.plugins is None or facts.plugins.in_engine:
        return None
    path = bundle.path / facts.plugins.file
    try:
        found = file_sha256(path)
    except OSError as error:
        raise EngineMismatchError(
            f"the plugin library {path} can't be read ({error.strerror}): copy the whole bundle again, or rebuild it"
        ) from error
    if found != facts.plugins.sha256:
        raise EngineMismatchError(
            f"the plugin library {path} has the SHA-256 {found}, and the engine was built with "
            f"{facts.plugins.sha256}: copy the bundle again, or rebuild it"
        )
    return path
