"""Queries, keys and values of a layer in one tensor (`attn.c_attn`), read as the separate ones; nothing is copied.

Source: `QWenAttention` of modeling_qwen.py, which splits the rows of `c_attn` [3 x hidden, hidden] in three.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import FileSpan, TensorInfo
from qwen_aot.exporter.model.config import ModelConfig

_FUSED = re.compile(r"(?P<attention>.*\.attn\.c_attn)\.(?P<part>weight|bias)")
_PARTS = ("query", "key", "value")


def separate(path: Path, name: str, info: TensorInfo, config: ModelConfig) -> Iterator[tuple[str, TensorInfo]]:
    """One tensor under its name; one that holds queries, keys and values as each of these, `c_attn.query.weight`.

    A quantized weight, whose shape isn't known yet, is given three times without one.

    Args:
        path: of the checkpoint, for messages.
        name: without what a framework put around it.
        info: where it lies.
        config: tells the sizes.

    Raises:
        CheckpointError: it holds them and has another shape than the configuration says.
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        yield name, info
        return
    names = [f"{match['attention']}.{part}.{match['part']}" for part in _PARTS]
    if info.span is None:
        yield from ((each, info) for each in names)
        return
    rows = (config.query_size, config.key_value_size, config.key_value_size)
    rest = (config.hidden_size,) if match["part"] == "weight" else ()
    if info.shape != (sum(rows), *rest):
        raise CheckpointError(
            f"{path}: tensor {name} has shape {list(info.shape)}; accepted: {[sum(rows), *rest]} (queries, keys and "
            "values behind each other)"
        )
    row_bytes = info.span.length // sum(rows)
    offset = info.span.offset
    for each, count in zip(names, rows, strict=True):
        span = FileSpan(info.span.path, offset, count * row_bytes)
        yield each, replace(info, shape=(count, *rest), span=span)
        offset += span.length
