"""Facts of a checkpoint for `inspect`; no tensor is read."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

from qwen_aot.errors import CheckpointError

logger = logging.getLogger(__name__)


def facts(path: Path, *, list_tensors: bool) -> dict[str, Any]:
    """The configuration, the tokenizer's files and the tensors by dtype; logs a warning where these don't fit.

    Raises:
        CheckpointError: the path isn't a checkpoint.
    """
    from qwen_aot.exporter.checkpoint.open import open_checkpoint
    from qwen_aot.exporter.model.tensors import num_parameters
    from qwen_aot.exporter.weights.sources import check_headers

    with open_checkpoint(path) as checkpoint:
        try:
            check_headers(checkpoint)
        except CheckpointError as error:
            logger.warning("the tensors aren't those of the configuration, and no build takes them: %s", error)
        config = dataclasses.asdict(checkpoint.config)
        if config["moe"] is not None:
            config["moe"]["sparse_layers"] = sorted(config["moe"]["sparse_layers"])
        by_type: dict[str, tuple[int, int]] = {}
        for info in checkpoint.tensors.values():
            count, total = by_type.get(info.dtype.name, (0, 0))
            elements = math.prod(info.shape)
            by_type[info.dtype.name] = (count + 1, total + elements * info.dtype.itemsize)
        result: dict[str, Any] = {
            "kind": "checkpoint",
            "path": str(path),
            "num_parameters": num_parameters(checkpoint.config),
            **config,
            "source": dict(checkpoint.source),
            "tokenizer_files": sorted(checkpoint.tokenizer.files),
            "tensors_by_dtype": [
                {"dtype": name, "tensors": count, "bytes": total} for name, (count, total) in sorted(by_type.items())
            ],
        }
        if list_tensors:
            result["tensors"] = [
                {"name": info.name, "dtype": info.dtype.name, "shape": list(info.shape)}
                for info in checkpoint.tensors.values()
            ]
    return result
