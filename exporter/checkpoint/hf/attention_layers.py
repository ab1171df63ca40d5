"""Which layers of a config.json attend to a window only; refused unless no context reaches beyond it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config_values import count, flag

# transformers' defaults, the same for all model types.
_SLIDING_WINDOW = 4096
_MAX_WINDOW_LAYERS = 28

_WITHOUT_LAYER_TYPES = ("qwen3_moe",)  # whose classes in transformers don't read the key

_FULL = ("full_attention", "attention")  # the latter in old files
_SLIDING = "sliding_attention"


def check_attention_layers(raw: Mapping[str, Any], layers: int, context: int) -> None:
    """Every layer attends to its whole past, or to a window that the context doesn't exceed.

    A window of n tokens is a query's own and the n - 1 before it: one of the context's length leaves nothing out.

    Args:
        raw: the parsed config.json.
        layers: num_hidden_layers.
        context: tokens that the model can be given.

    Raises:
        CheckpointError: a layer attends to less, or in another way (named).
    """
    is_used = flag(raw, "use_sliding_window", False)
    window = count(raw, "sliding_window", _SLIDING_WINDOW) if raw.get("sliding_window", 0) is not None else None
    if raw["model_type"] in _WITHOUT_LAYER_TYPES or raw.get("layer_types") is None:
        sliding = _sliding_layers(raw, layers) if is_used else []
        what = f"use_sliding_window is true, so that layer {sliding[0]} attends" if sliding else ""
    else:
        sliding = _named_layers(raw["layer_types"], layers)
        what = f"layer_types[{sliding[0]}] is {_SLIDING!r}: it attends" if sliding else ""
    if not sliding:
        return
    if not is_used or window is None:  # transformers drops the window then, and fails
        raise CheckpointError(
            f"{what} to a window, but use_sliding_window is {raw.get('use_sliding_window')} and sliding_window "
            f"{raw.get('sliding_window')}; accepted: 'full_attention' in all layers"
        )
    if window < context:
        raise CheckpointError(
            f"{what} to the last {window} tokens only (sliding_window), fewer than the context of {context}; not "
            f"supported; accepted: use_sliding_window false, a sliding_window from {context}, or the context "
            f"(max_position_embeddings) cut to {window}"
        )


def _sliding_layers(raw: Mapping[str, Any], layers: int) -> list[int]:
    """Layers with a window where layer_types doesn't say it. transformers counts in another way for each model_type."""
    bound = count(raw, "max_window_layers", _MAX_WINDOW_LAYERS)
    if raw["model_type"] == "qwen2_moe":
        return [layer for layer in range(layers) if layer < bound and layer % 2 == 0]
    if raw.get("sliding_window", 0) is None:
        return []
    if raw["model_type"] == "qwen3_moe":
        bound = 0
    return [layer for layer in range(layers) if layer >= bound]


def _named_layers(layer_types: object, layers: int) -> list[int]:
    if not isinstance(layer_types, list) or len(layer_types) != layers:
        raise CheckpointError(f"layer_types is {layer_types!r}; accepted: a list of num_hidden_layers ({layers})")
    for layer, kind in enumerate(layer_types):
        if kind not in (*_FULL, _SLIDING):
            raise CheckpointError(f"layer_types[{layer}] is {kind!r}; not supported; accepted: 'full_attention'")
    return [layer for layer, kind in enumerate(layer_types) if kind == _SLIDING]
