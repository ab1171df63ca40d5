"""What a manifest says of the vision engine, as far as this runtime can run it, and what every run is checked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import EngineMismatchError, GenerationError
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.engine.io_table import image_width

__all__ = ["VisionTable", "check_rows", "check_run", "vision_table"]


@dataclass(frozen=True, slots=True)
class VisionTable:
    """A vision engine's one input, float32 [B, size, size, 3], and its one output, float32 [B, rows, M]."""

    file: str
    input: str
    output: str
    image_size: int
    rows: int
    width: int
    max_images: int


def vision_table(manifest: Manifest) -> VisionTable:
    """The bundle's vision engine.

    Raises:
        EngineMismatchError: it has none, or one with other inputs and outputs, or rows that the decoder doesn't take.
    """
    engine, width = manifest.engines.vision, image_width(manifest)
    if engine is None:
        raise EngineMismatchError("the bundle has no vision engine, so it takes no images (one of Qwen-VL has one)")
    shown = [f"{each.name} {each.dtype} {list(each.shape)}" for each in (*engine.inputs, *engine.outputs)]
    if len(shown) == 2:
        (pixels,), (embeddings,) = engine.inputs, engine.outputs
        size, rows = pixels.shape[1], embeddings.shape[1] if len(embeddings.shape) == 3 else None
        if (
            (pixels.name, pixels.dtype, pixels.shape) == ("pixels", "float32", ("B", size, size, 3))
            and (embeddings.name, embeddings.dtype) == ("image_embeddings", "float32")
            and embeddings.shape == ("B", rows, width)
        ):
            assert isinstance(size, int) and isinstance(rows, int) and isinstance(width, int)
            return VisionTable(engine.file, pixels.name, embeddings.name, size, rows, width, engine.max_batch)
    raise EngineMismatchError(
        f"the vision engine has {'; '.join(shown)}; accepted: pixels float32 [B, size, size, 3] and image_embeddings "
        f"float32 [B, rows, {width}], of which the decoder takes {width or 'none'}; rebuild the bundle"
    )


def check_run(table: VisionTable, pixels: NDArray[np.uint8]) -> None:
    """Refuses pixels that the engine can't take.

    Raises:
        GenerationError: says which are accepted.
    """
    size = table.image_size
    if pixels.shape[1:] != (size, size, 3) or not 1 <= len(pixels) <= table.max_images:
        raise GenerationError(
            f"pixels are {list(pixels.shape)}; accepted: 1 to {table.max_images} images of [{size}, {size}, 3]"
        )


def check_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows of a run.

    Raises:
        GenerationError: they hold NaN or Inf.
    """
    if not np.isfinite(rows).all():
        raise GenerationError(
            "the vision engine's rows hold NaN or Inf: a value left the range of the compute type, or the weights are "
            "damaged. Rebuild the bundle with a wider type (--precision bf16)"
        )
    return rows
