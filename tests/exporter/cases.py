"""The model configurations that every lowering must get right, as arguments of `tests.checkpoints.save_tiny`."""

from __future__ import annotations

from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"heads": 6, "kv_heads": 2, "hidden": 96},
    "mqa": {"heads": 4, "kv_heads": 1},
    "tied": {"tied": True},
    "head_dim": {"heads": 4, "kv_heads": 2, "head_dim": 32, "hidden": 64},
    "one_layer": {"layers": 1},
    "many_layers": {"layers": 7},
    "odd_vocab": {"vocab": 97, "tied": True},
    "moe": {"moe": {}},
    "moe_norm": {"moe": {"norm_topk_prob": True}},
    "moe_k1": {"moe": {"num_experts": 3, "num_experts_per_tok": 1}},
    "moe_mixed": {"layers": 5, "moe": {"mlp_only_layers": [1, 4]}},
    "qwen3": {"generation": "qwen3", "heads": 4, "kv_heads": 2, "head_dim": 32},
    "qwen3_tied": {"generation": "qwen3", "kv_heads": 1, "tied": True},
    "qwen3_moe": {
        "generation": "qwen3",
        "kv_heads": 2,
        "head_dim": 32,
        "layers": 3,
        "moe": {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [1]},
    },
    "moe_sparse_step": {"layers": 4, "moe": {"decoder_sparse_step": 2}},
}
