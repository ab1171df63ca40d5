"""The interface of every target's builder, and the table of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from engines.spec import BuildSpec, Target
from exporter.weights import Traced
from runtime.manifest import Manifest


class Builder(Protocol):
    """What a target does its own way. A module with these three functions."""

    def lower(self, traced: Traced, spec: BuildSpec) -> Traced:
        """Rewrites the traced graph into what the target runs best."""

    def finish(self, folder: Path, spec: BuildSpec) -> None:
        """Turns the stitched model.onnx into the target's engine (ONNX Runtime runs it as it is)."""

    def check(self, folder: Path, manifest: Manifest) -> None:
        """Opens the engine, where this machine can.

        Raises:
            BuildError: it doesn't open.
        """


# Modules, imported when a build needs them: a target's library may be absent.
BUILDERS: Mapping[Target, str] = {Target.CPU: "engines.onnxruntime", Target.CUDA: "engines.cuda"}


def builder_for(target: Target) -> Builder:
    """The builder of a target."""
    return cast(Builder, importlib.import_module(BUILDERS[target]))
