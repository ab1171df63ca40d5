"""Whether a bundle was built from a checkpoint of this shape: asked before anything is compared."""

from __future__ import annotations

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.model.vision_tensors import num_model_parameters
from qwen_aot.runtime.bundle.manifest import Manifest


def require_same_model(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Compares the vocabulary, the layers and the number of parameters.

    A folder that was quantized here has q, k and v biases of zeros where its model has none and transformers' class has
    them anyway, so that they don't count.

    Raises:
        CheckpointError: one of them differs; says both values.
    """
    model, config = manifest.model, checkpoint.config
    with_biases = num_model_parameters(config.as_in_transformers)
    for name, ours, theirs in (
        ("vocab_size", model.vocab_size, config.vocab_size),
        ("num_hidden_layers", model.num_hidden_layers, config.num_hidden_layers),
        ("num_parameters", model.num_parameters, num_model_parameters(config)),
    ):
        if ours != theirs and (name, ours) != ("num_parameters", with_biases):
            raise CheckpointError(
                f"the reference {checkpoint.path} has {name} {theirs:,}, the bundle's model {model.name} has "
                f"{ours:,}: give the checkpoint that the bundle was built from"
            )
