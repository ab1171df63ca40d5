"""The interface of every target's builder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from qwen_aot.engines.bundle.stages import Advance
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.targets import TARGETS, Target
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.runtime.bundle.manifest import IoTensor, KernelGraph, Manifest, StepPlan, TensorRtFacts


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a finished engine says about itself; the manifest is made from it.

    Attributes:
        inputs, outputs: its I/O table.
        tensorrt: what it can't be asked without its GPU; None: it isn't TensorRT's.
        plan: what the compiler made of each profile's step; None: the engine doesn't say.
        kernels: the graph that was written beside it for own CPU kernels, if one was.
    """

    inputs: tuple[IoTensor, ...]
    outputs: tuple[IoTensor, ...]
    tensorrt: TensorRtFacts | None
    plan: Mapping[str, StepPlan] | None
    kernels: KernelGraph | None = None


class Builder(Protocol):
    """What a target does its own way. A module with these functions; `engines.spec.targets` names it."""

    def require(self, spec: BuildSpec) -> None:
        """Checks that the target's library is here and can do what is asked for, before any work is done.

        Raises:
            BuildError: it isn't or can't; names the remedy.
        """

    def lower(self, traced: Traced, spec: BuildSpec) -> Traced:
        """Rewrites the traced graph into what the target runs best."""

    def finish(self, folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> EngineFacts | None:
        """Turns the stitched model.onnx in `folder` into the target's engine.

        Args:
            folder: the bundle under construction.
            spec: the request.
            lowered: the graph that model.onnx holds.
            advance: called with percent done and 100.

        Returns:
            What the engine says about itself; None where model.onnx is the engine and all there is.

        Raises:
            BuildError: the target's library refuses.
        """

    def lower_vision(self, traced: Traced, spec: BuildSpec) -> Traced:
        """Rewrites the traced graph of the vision tower; of targets with a `vision_file` only."""

    def finish_vision(self, folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> EngineFacts | None:
        """Turns the stitched vision.onnx in `folder` into the target's engine, as `finish` does with model.onnx."""

    def check(self, folder: Path, manifest: Manifest) -> None:
        """Opens the engine, or checks what can be checked of it on this machine.

        Raises:
            BuildError: it doesn't open, or isn't what it should be.
        """


def builder_for(target: Target) -> Builder:
    """The builder of a target, imported only now: its library may be absent."""
    return cast(Builder, importlib.import_module(TARGETS[target].builder))
