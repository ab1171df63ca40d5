"""Which tensors a checkpoint must hold, and what is wrong with those it holds."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.checkpoint.base import TensorInfo
from exporter.config import ModelConfig
from qwen_aot_errors import CheckpointError

_SHOWN = 5  # names in a message; the rest are counted


def is_skipped(name: str, config: ModelConfig) -> bool:
    """Whether a tensor may be there without being used: old rotary buffers, a tied model's output head."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def check_tensors(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> None:
    """Checks names and shapes against the model's exact set (`ModelConfig.tensor_shapes`).

    That a tied checkpoint's `lm_head.weight` equals the embedding is for the one who reads the values.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; the message names it.
    """
    expected = config.tensor_shapes()
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_listed(missing)}, which its configuration asks for")
    unexpected = [name for name in tensors if name not in expected and not is_skipped(name, config)]
    if unexpected:
        raise CheckpointError(f"the checkpoint has {_listed(unexpected)}, which its configuration has no use for")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensors[name].shape)}; the configuration asks for {list(shape)}"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{more}"
