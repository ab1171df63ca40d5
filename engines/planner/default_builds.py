"""What a build without flags makes of a checkpoint, for each target; nothing is traced and no weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.planner.plans import refusal_of_model
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.own_codes import NoProductsError, precision_of, settled
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.spec.targets import Target
from qwen_aot.errors import BuildError, ExportError
from qwen_aot.exporter.checkpoint.storage import Storage
from qwen_aot.exporter.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class DefaultBuild:
    """One target's.

    Attributes:
        precision: of the weights.
        own_codes: weights keep the codes that the checkpoint stores.
        refusal: why there is no such build, and what is accepted; None: there is one.
    """

    target: Target
    precision: Precision
    own_codes: bool
    refusal: str | None


def default_builds(config: ModelConfig, storage: Storage) -> Iterator[DefaultBuild]:
    """A build for each target, in the targets' order."""
    for target in Target:
        try:
            spec = settled(BuildSpec(target=target), storage)
        except NoProductsError as error:
            yield DefaultBuild(target, precision_of([each for _, each in storage.fixed]), True, str(error))
            continue
        yield DefaultBuild(target, spec.precision, spec.own_codes, _refusal(config, spec, storage))


def _refusal(config: ModelConfig, spec: BuildSpec, storage: Storage) -> str | None:
    refusal = refusal_of_model(config, spec)
    if refusal is not None:
        return refusal
    try:
        footprint(config, spec, storage)
    except (BuildError, ExportError) as error:
        return str(error)
    return None
