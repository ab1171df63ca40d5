"""What the kinds of decoder differ in that config.json calls `model_type`: a row each, the one list of them.

All are one decoder (`exporter.graph.modeling`). Readers, refusals, references and what is written ask these rows;
how a file of each kind spells its facts is its reader's (`exporter.checkpoint.hf.architectures`, `gguf.config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelType:
    """One kind of decoder.

    Attributes:
        transformers_class: the class of transformers that is the same model; None: it has none of this name, and what
            it would run for the name is code of the checkpoint's, which nothing here does.
        gguf: `general.architecture` of its GGUF files.
        has_experts: some of its layers have routed experts.
        has_head_norms: each head's queries and keys are normalised (RMSNorm over the head) before they are rotated.
        has_biases: that class has biases of q, k and v without being asked. A model without them has zeros there.
    """

    transformers_class: str | None
    gguf: str
    has_experts: bool
    has_head_norms: bool
    has_biases: bool


MODEL_TYPES: Mapping[str, ModelType] = {
    "qwen": ModelType(None, "qwen", has_experts=False, has_head_norms=False, has_biases=True),
    "qwen2": ModelType("Qwen2ForCausalLM", "qwen2", has_experts=False, has_head_norms=False, has_biases=True),
    "qwen2_moe": ModelType("Qwen2MoeForCausalLM", "qwen2moe", has_experts=True, has_head_norms=False, has_biases=True),
    "qwen3": ModelType("Qwen3ForCausalLM", "qwen3", has_experts=False, has_head_norms=True, has_biases=False),
    "qwen3_moe": ModelType("Qwen3MoeForCausalLM", "qwen3moe", has_experts=True, has_head_norms=True, has_biases=False),
}
