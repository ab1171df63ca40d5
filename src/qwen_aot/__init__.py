"""The public face of qwen-aot: names re-exported from where they live, each imported when it is first used.

Example:
    >>> import qwen_aot
    >>> qwen_aot.build_bundle("Qwen1.5-0.5B-Chat", qwen_aot.BuildSpec(precision="int4"), "bundle")
    >>> with qwen_aot.load("bundle") as generator:
    ...     print(generator.generate("The capital of France is", max_new_tokens=32).text)
    ...     print(generator.chat([{"role": "user", "content": "Hello"}]).text)

A device has no extra `build`, which `build_bundle`, `BuildReport` and `open_checkpoint` need. There these names give
stand-ins: `from qwen_aot import *`, `help` and `hasattr` work as everywhere, and calling one raises `BuildError`, which
names the extra.
"""

from __future__ import annotations

import functools
import importlib
import operator
import os.path
from typing import TYPE_CHECKING, Any, NoReturn

from qwen_aot.extras import missing_package
from qwen_aot.version import __version__

if TYPE_CHECKING:
    from qwen_aot.engines.build import BuildReport, build_bundle
    from qwen_aot.engines.spec.build_spec import BuildSpec
    from qwen_aot.engines.spec.precisions import Precision
    from qwen_aot.engines.spec.targets import Target
    from qwen_aot.errors import (
        BuildError,
        BundleError,
        CheckpointError,
        ConstraintError,
        ContextFullError,
        DeployError,
        EngineMismatchError,
        ExportError,
        GenerationError,
        QueueFullError,
        ServiceClosedError,
    )
    from qwen_aot.exporter.checkpoint.open import open_checkpoint
    from qwen_aot.runtime.bundle.manifest import Manifest
    from qwen_aot.runtime.generation.arguments import Prompt
    from qwen_aot.runtime.generation.chat import Chat
    from qwen_aot.runtime.generation.config import GenerationConfig, GenerationDefaults
    from qwen_aot.runtime.generation.generator import EventStream, Generator
    from qwen_aot.runtime.generation.handle import RequestHandle
    from qwen_aot.runtime.generation.options import GenerationOptions
    from qwen_aot.runtime.generation.request import Completion, Event, FinishReason, Request, Timings, TokenEvent
    from qwen_aot.runtime.generation.sampling import TokenLogprobs
    from qwen_aot.runtime.generation.service import GenerationService, ServiceStatistics
    from qwen_aot.runtime.text.chat_template import Message
    from qwen_aot.runtime.vision.boxes import Box, draw_boxes, find_boxes
    from qwen_aot.runtime.vision.pictures import Picture, open_picture

    load = Generator.open

__all__ = [
    "Box",
    "BuildError",
    "BuildReport",
    "BuildSpec",
    "BundleError",
    "Chat",
    "CheckpointError",
    "Completion",
    "ConstraintError",
    "ContextFullError",
    "DeployError",
    "EngineMismatchError",
    "Event",
    "EventStream",
    "ExportError",
    "FinishReason",
    "GenerationConfig",
    "GenerationDefaults",
    "GenerationError",
    "GenerationOptions",
    "GenerationService",
    "Generator",
    "Manifest",
    "Message",
    "Picture",
    "Precision",
    "Prompt",
    "QueueFullError",
    "Request",
    "RequestHandle",
    "ServiceClosedError",
    "ServiceStatistics",
    "Target",
    "Timings",
    "TokenEvent",
    "TokenLogprobs",
    "__version__",
    "build_bundle",
    "draw_boxes",
    "find_boxes",
    "load",
    "open_checkpoint",
    "open_picture",
]

_ERRORS = [name for name in __all__ if name.endswith("Error")]
_HOMES = {
    **dict.fromkeys(_ERRORS, "qwen_aot.errors"),
    **dict.fromkeys(("BuildReport", "build_bundle"), "qwen_aot.engines.build"),
    "BuildSpec": "qwen_aot.engines.spec.build_spec",
    "Precision": "qwen_aot.engines.spec.precisions",
    "Target": "qwen_aot.engines.spec.targets",
    "open_checkpoint": "qwen_aot.exporter.checkpoint.open",
    "Chat": "qwen_aot.runtime.generation.chat",
    **dict.fromkeys(("GenerationConfig", "GenerationDefaults"), "qwen_aot.runtime.generation.config"),
    "GenerationOptions": "qwen_aot.runtime.generation.options",
    **dict.fromkeys(("GenerationService", "ServiceStatistics"), "qwen_aot.runtime.generation.service"),
    **dict.fromkeys(("EventStream", "Generator", "load"), "qwen_aot.runtime.generation.generator"),
    "RequestHandle": "qwen_aot.runtime.generation.handle",
    "TokenLogprobs": "qwen_aot.runtime.generation.sampling",
    "Prompt": "qwen_aot.runtime.generation.arguments",
    "Message": "qwen_aot.runtime.text.chat_template",
    "Manifest": "qwen_aot.runtime.bundle.manifest",
    **dict.fromkeys(("Box", "draw_boxes", "find_boxes"), "qwen_aot.runtime.vision.boxes"),
    **dict.fromkeys(("Picture", "open_picture"), "qwen_aot.runtime.vision.pictures"),
    **dict.fromkeys(
        ("Completion", "Event", "FinishReason", "Request", "Timings", "TokenEvent"),
        "qwen_aot.runtime.generation.request",
    ),
}
_OTHER_NAMES = {"load": "Generator.open"}  # in their home, where they are called differently there


if not TYPE_CHECKING:  # type checkers would take every name for one of ours, of type Any

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'qwen_aot' has no attribute {name!r}")
        try:
            home = importlib.import_module(_HOMES[name])
        except ModuleNotFoundError as error:
            return _stand_in(name, missing_package(f"qwen_aot.{name}", error))
        return operator.attrgetter(_OTHER_NAMES.get(name, name))(home)


def __dir__() -> list[str]:
    return sorted(__all__)


@functools.cache
def _stand_in(name: str, reason: str) -> type:
    """What a name gives where its extra isn't installed: a class, which `isinstance` takes, that can't be called."""

    def refuse(cls: type, *args: object, **kwargs: object) -> NoReturn:
        from qwen_aot.errors import BuildError

        raise BuildError(reason)

    return type(name, (), {"__doc__": f"Not here: {reason}.", "__module__": __name__, "__new__": refuse})


def _require_links() -> None:
    """Refuses a checkout in which git wrote the links' text in their place, as on Windows by default."""
    if os.path.isfile(os.path.join(os.path.dirname(__file__), "runtime")):
        raise ImportError(
            "src/qwen_aot holds text files in the place of its links to exporter, engines, runtime and plugins: this "
            "checkout was made without symbolic links. On Windows turn on Developer Mode, then run `git config "
            "core.symlinks true` and `git checkout -- src/qwen_aot`; or use WSL, or install the wheel"
        )


_require_links()
