"""A manifest's I/O table, as far as this runtime can feed it."""

from __future__ import annotations

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.bundle.manifest import (
    CACHE_PREFIX,
    LAST_LOGITS,
    LOGITS_POSITIONS,
    ROTARY_OFFSET,
    IoTensor,
    Manifest,
)

__all__ = [
    "IMAGE_EMBEDDINGS",
    "IMAGE_POSITIONS",
    "STEP_INPUTS",
    "cache_inputs",
    "check_table",
    "image_width",
    "present_name",
]

IMAGE_EMBEDDINGS = "image_embeddings"  # float32 [I, M]
IMAGE_POSITIONS = "image_positions"

# int64, all of them
STEP_INPUTS = (
    "input_ids",
    "position_ids",
    "cache_length",
    "new_tokens",
    "key_positions",
    LOGITS_POSITIONS,
    IMAGE_POSITIONS,
)


def cache_inputs(manifest: Manifest) -> list[IoTensor]:
    """The inputs past_key_values.*, in the table's order."""
    return [tensor for tensor in manifest.engines.text.inputs if tensor.name.startswith(CACHE_PREFIX)]


def present_name(past: str) -> str:
    """The output that shares a cache input's memory."""
    return past.replace(CACHE_PREFIX, "present.", 1)


def image_width(manifest: Manifest) -> int | None:
    """M of the rows that a step takes from images; None: it takes none."""
    found = [tensor.shape for tensor in manifest.engines.text.inputs if tensor.name == IMAGE_EMBEDDINGS]
    return int(found[0][1]) if found else None


def check_table(manifest: Manifest) -> None:
    """Refuses inputs and outputs that no step can feed or take.

    Raises:
        EngineMismatchError: names them.
    """
    engine, past = manifest.engines.text, cache_inputs(manifest)
    rotary = engine.rotary_input
    known = {*STEP_INPUTS, *(() if rotary is None else (rotary.name,))}
    images = [tensor for tensor in engine.inputs if tensor.name in (IMAGE_EMBEDDINGS, IMAGE_POSITIONS)]
    if images and (len(images) < 2 or not any(_is_image_rows(tensor) for tensor in images)):
        shown = "; ".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in images)
        raise EngineMismatchError(
            f"the bundle's graph takes images by {shown}; accepted: {IMAGE_EMBEDDINGS} (float32 [I, size]) and "
            f"{IMAGE_POSITIONS}, or neither"
        )
    for tensor in engine.inputs:
        if tensor not in past and not _is_image_rows(tensor) and (tensor.name not in known or tensor.dtype != "int64"):
            raise EngineMismatchError(
                f"the bundle's graph has the input {tensor.name!r} of dtype {tensor.dtype}, which this runtime can't "
                f"feed; accepted: past_key_values.* and {', '.join(sorted(STEP_INPUTS))}, {ROTARY_OFFSET}N (int64)"
            )
    logits = IoTensor("logits", "float32", ("B", manifest.model.vocab_size))
    outputs = {"logits", *(present_name(tensor.name) for tensor in past)}
    if engine.logits_rows is not None:
        outputs.add(LAST_LOGITS)
    found = {tensor.name for tensor in engine.outputs}
    if outputs != found or logits not in engine.outputs:
        raise EngineMismatchError(
            f"the bundle's graph has the outputs {sorted(found)}; accepted: logits (float32 [B, "
            f"{manifest.model.vocab_size}]) and a present.* for each past_key_values.*, {sorted(outputs)}"
        )


def _is_image_rows(tensor: IoTensor) -> bool:
    is_shape = len(tensor.shape) == 2 and tensor.shape[0] == "I" and isinstance(tensor.shape[1], int)
    return tensor.name == IMAGE_EMBEDDINGS and tensor.dtype == "float32" and is_shape
