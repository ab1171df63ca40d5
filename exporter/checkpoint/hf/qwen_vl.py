"""What Qwen-VL adds to a first-generation Qwen's config.json: `visual`, the facts of its vision tower.

Source: `VisionTransformer` of visual.py as published with Qwen-VL.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config_values import count, number
from qwen_aot.exporter.model.vision import NUM_QUERIES, VisionConfig

logger = logging.getLogger(__name__)

_COUNTS = ("image_size", "patch_size", "width", "layers", "heads", "output_dim", "image_start_id")
_KNOWN = {*_COUNTS, "mlp_ratio", "n_queries"}


def read_visual(raw: Mapping[str, Any]) -> VisionConfig | None:
    """The tower of a parsed config.json; None: the model takes no images.

    Raises:
        CheckpointError: a key is missing, or a value is not supported (named).
    """
    visual = raw.get("visual")
    if visual is None:
        return None
    if not isinstance(visual, dict):
        raise CheckpointError(f"visual is {visual!r}; accepted: an object with {', '.join(sorted(_KNOWN))}, or nothing")
    queries = visual.get("n_queries", NUM_QUERIES)
    if queries != NUM_QUERIES:
        raise CheckpointError(f"visual.n_queries is {queries!r}; accepted: {NUM_QUERIES}, the published model's")
    if unknown := sorted(visual.keys() - _KNOWN):
        logger.warning("visual of config.json has keys that are not known here and are ignored: %s", ", ".join(unknown))
    try:
        return VisionConfig(
            mlp_ratio=number(visual, "mlp_ratio", 4.0), **{name: count(visual, name) for name in _COUNTS}
        )
    except CheckpointError as error:
        said = str(error)
        raise CheckpointError(said if said.startswith("visual.") else f"visual.{said}") from error
