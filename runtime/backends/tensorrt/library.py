"""Loads the TensorRT library that a bundle's engine was built by."""

from __future__ import annotations

import importlib
import logging
import re
from collections import deque
from typing import Any

from qwen_aot.errors import EngineMismatchError
from qwen_aot.extras import obstacle
from qwen_aot.runtime.bundle.flavours import Flavour, flavour_of
from qwen_aot.runtime.bundle.manifest import Manifest, TensorRtFacts

__all__ = ["Library", "load_library"]

logger = logging.getLogger(__name__)


class Library:
    """An imported flavour, and what it logged last: its calls say no more than that they failed.

    Attributes:
        flavour: which.
        api: the module.
        logger: the ILogger that every object of the library is made with; must outlive them.
    """

    def __init__(self, flavour: Flavour, api: Any) -> None:
        self.flavour = flavour
        self.api = api
        self._errors: deque[str] = deque(maxlen=4)
        self.logger = _make_logger(api, self._errors)

    def take_errors(self) -> str:
        """The library's latest error messages, oldest first; forgets them."""
        text = "; ".join(dict.fromkeys(self._errors))
        self._errors.clear()
        return text or "it gave no reason"


def load_library(manifest: Manifest, facts: TensorRtFacts) -> Library:
    """Imports the flavour of a bundle's engine.

    Raises:
        EngineMismatchError: it is missing, or of a version that can't run the engine.
    """
    flavour = flavour_of(manifest.engines.text.file)
    assert flavour is not None  # what `open_engine` chose this backend by
    version = ".".join(map(str, _numbers(facts.version)))
    install = obstacle(flavour.target) or flavour.install_version.format(version=version)
    try:
        api = importlib.import_module(flavour.module)
    except (ImportError, OSError) as error:  # OSError: the bindings are there, the libraries aren't
        raise EngineMismatchError(
            f"{flavour.title} can't be imported ({error}): install version {facts.version}, which built this bundle: "
            f"{install}"
        ) from error
    found = str(api.__version__)
    if not _can_run(found, facts):
        later = " or later" if facts.version_compatible else ""
        raise EngineMismatchError(
            f"{flavour.title} is {found}, and the bundle's engine was built by {facts.version}; accepted: version "
            f"{facts.version}{later}. Install it ({install}), or rebuild the bundle with the version that is installed"
        )
    return Library(flavour, api)


def _can_run(found: str, facts: TensorRtFacts) -> bool:
    """Whether a version loads the engine: the one that built it, to its build number, or with leave a later one.

    Sources: NVIDIA's documentation, "Version Compatibility" and "Engine Compatibility" (TensorRT-RTX).
    """
    has, wants = _numbers(found), _numbers(facts.version)
    known = min(len(has), len(wants))  # some packages leave the build number out
    return has[:known] == wants[:known] or (facts.version_compatible and has > wants)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, "1.7.1.116" or "10.13.3.9.post1"."""
    return tuple(int(part) for part in re.match(r"(?:\d+\.)*\d*", version)[0].split(".") if part)  # type: ignore[index]


def _make_logger(api: Any, errors: deque[str]) -> Any:
    """An ILogger that keeps errors and sends the rest to `logging`.

    The class can be made only once its base has been imported.
    """
    severity = api.ILogger.Severity

    class Logger(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                errors.append(message)
            logger.debug("%s", message)

    return Logger()
