"""The two flavours of TensorRT: one Python API under two names, and the few things in which they differ."""

from __future__ import annotations

import importlib
import logging
import re
from collections import deque
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.bundle.manifest import Manifest, TensorRtFacts

__all__ = ["FLAVOURS", "Flavour", "Library", "flavour_of", "load_library"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Flavour:
    """What one flavour's name stands for.

    Attributes:
        suffix: of its engine files.
        module: that is imported.
        name: for messages.
        install: a command, with the place for a version.
        captures_graphs: the library captures CUDA graphs itself, if asked through its runtime configuration. It
            compiles kernels for a shape while slower ones already run; a graph captured from outside would keep the
            slow ones for good. Source: TensorRT-RTX's documentation, "Working with RTX CUDA Graphs".
        compiles_on_device: an engine's kernels are compiled where it runs, and its contexts take a runtime
            configuration, which can hold a cache of them. Source: the same, "Working with Runtime Cache".
        builds_for_others: it builds engines for GPUs that aren't there.
    """

    suffix: str
    module: str
    name: str
    install: str
    captures_graphs: bool
    compiles_on_device: bool
    builds_for_others: bool


FLAVOURS = (
    Flavour(
        ".rtx",
        "tensorrt_rtx",
        "TensorRT-RTX",
        "pip install tensorrt-rtx-cu13=={version}",
        captures_graphs=True,
        compiles_on_device=True,
        builds_for_others=True,
    ),
    Flavour(
        ".plan",
        "tensorrt",
        "TensorRT",
        "pip install tensorrt=={version} (on a Jetson: apt install python3-libnvinfer)",
        captures_graphs=False,
        compiles_on_device=False,
        builds_for_others=False,
    ),
)


def flavour_of(engine: str) -> Flavour | None:
    """The flavour that an engine file's name belongs to; None: neither."""
    suffix = PurePosixPath(engine).suffix
    return next((flavour for flavour in FLAVOURS if flavour.suffix == suffix), None)


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
    install = flavour.install.format(version=".".join(map(str, _numbers(facts.version))))
    try:
        api = importlib.import_module(flavour.module)
    except (ImportError, OSError) as error:  # OSError: the bindings are there, the libraries aren't
        raise EngineMismatchError(
            f"{flavour.name} can't be imported ({error}): install version {facts.version}, which built this bundle: "
            f"{install}"
        ) from error
    found = str(api.__version__)
    if not _can_run(found, facts):
        later = " or later" if facts.version_compatible else ""
        raise EngineMismatchError(
            f"{flavour.name} is {found}, and the bundle's engine was built by {facts.version}; accepted: version "
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
