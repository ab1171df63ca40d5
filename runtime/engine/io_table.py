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

__all__ = ["STEP_INPUTS", "cache_inputs", "check_table", "present_name"]

# int64, all of them
STEP_INPUTS = ("input_ids", "position_ids", "cache_length", "new_tokens", "key_positions", LOGITS_POSITIONS)


def cache_inputs(manifest: Manifest) -> list[IoTensor]:
    """The inputs past_key_values.*, in the table's order."""
    return [tensor for tensor in manifest.engines.text.inputs if tensor.name.startswith(CACHE_PREFIX)]


def present_name(past: str) -> str:
    """The output that shares a cache input's memory."""
    return past.replace(CACHE_PREFIX, "present.", 1)


def check_table(manifest: Manifest) -> None:
    """Refuses inputs and outputs that no step can feed or take.

    Raises:
        EngineMismatchError: names them.
    """
    engine, past = manifest.engines.text, cache_inputs(manifest)
    rotary = engine.rotary_input
    known = {*STEP_INPUTS, *(() if rotary is None else (rotary.name,))}
    for tensor in engine.inputs:
        if tensor not in past and (tensor.name not in known or tensor.dtype != "int64"):
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
