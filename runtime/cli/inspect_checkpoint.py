"""Facts of a checkpoint for `inspect`; no weight is read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_aot.errors import CheckpointError

if TYPE_CHECKING:
    from qwen_aot.exporter.checkpoint.base import Checkpoint, TensorInfo

logger = logging.getLogger(__name__)


def facts(path: Path, *, list_tensors: bool) -> dict[str, Any]:
    """The configuration, the tokenizer's files, the tensors by how they are stored, and what builds make of them.

    Logs a warning where the tensors aren't those of the configuration.

    Raises:
        CheckpointError: the path isn't a checkpoint.
    """
    from qwen_aot.exporter.checkpoint.open import open_checkpoint
    from qwen_aot.exporter.model.vision_tensors import num_model_parameters

    with open_checkpoint(path) as checkpoint:
        config = dataclasses.asdict(checkpoint.config)
        if config["moe"] is not None:
            config["moe"]["sparse_layers"] = sorted(config["moe"]["sparse_layers"])
        result: dict[str, Any] = {
            "kind": "checkpoint",
            "path": str(path),
            "num_parameters": num_model_parameters(checkpoint.config),
            **config,
            "source": dict(checkpoint.source),
            "tokenizer_files": sorted(checkpoint.tokenizer.files),
            "stored_bytes": sum(info.stored_bytes for info in checkpoint.tensors.values()),
            "tensors_by_dtype": _by_dtype(checkpoint.tensors.values()),
            "tensors_by_encoding": _by_encoding(checkpoint.tensors.values()),
            "builds_without_flags": _builds(checkpoint),
        }
        if list_tensors:
            result["tensors"] = [
                {
                    "name": info.name,
                    "dtype": info.dtype.name if info.encoding is None else None,
                    "encoding": None if info.encoding is None else info.encoding.name,
                    "shape": list(info.shape),
                    "bytes": info.stored_bytes,
                }
                for info in checkpoint.tensors.values()
            ]
    return result


def _by_dtype(tensors: Iterable[TensorInfo]) -> list[dict[str, Any]]:
    """Those of plain numbers."""
    found: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        if info.encoding is None:
            found.setdefault(info.dtype.name, []).append(info)
    return [{"dtype": name, **_totals(each)} for name, each in sorted(found.items())]


def _by_encoding(tensors: Iterable[TensorInfo]) -> list[dict[str, Any]]:
    """Those of codes, by all that tells how they are stored; a type without codes of their form has a name alone."""
    found: dict[tuple[Any, ...], list[TensorInfo]] = {}
    for info in tensors:
        if info.encoding is None:
            continue
        form = info.encoding.form
        key: tuple[Any, ...] = (info.encoding.name, None, None, None, None, None)
        if form is not None:
            scales, order = form.scale_dtype.name, "other" if form.has_permutation else "own"
            key = (info.encoding.name, form.bits, form.group_size, scales, form.has_zero_points, order)
        found.setdefault(key, []).append(info)
    names = ("encoding", "bits", "group_size", "scales", "zero_points", "order")
    return [dict(zip(names, key, strict=True)) | _totals(found[key]) for key in sorted(found, key=str)]


def _totals(tensors: list[TensorInfo]) -> dict[str, int]:
    return {"tensors": len(tensors), "bytes": sum(info.stored_bytes for info in tensors)}


def _builds(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What a build without flags makes of it for each target; empty: no build takes it, and a warning says why."""
    from qwen_aot.engines.planner.default_builds import default_builds
    from qwen_aot.exporter.checkpoint.storage import storage_of
    from qwen_aot.exporter.weights.sources import check_headers

    try:
        check_headers(checkpoint)
        storage = storage_of(checkpoint)
    except CheckpointError as error:
        logger.warning("the tensors aren't those of the configuration, and no build takes them: %s", error)
        return []
    return [
        {
            "target": str(build.target),
            "precision": str(build.precision),
            "own_codes": build.own_codes,
            "refusal": build.refusal,
        }
        for build in default_builds(checkpoint.config, storage)
    ]
