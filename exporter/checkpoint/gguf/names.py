"""Names of tensors in GGUF files, the same for the layouts `qwen`, `qwen2`, `qwen2moe` and `llama`.

Source: the GGUF specification's standardized tensor names. All experts of a layer are one tensor, and so are in `qwen`
its queries, keys and values.
"""

from __future__ import annotations

from qwen_aot.exporter.checkpoint.names import TensorNames
from qwen_aot.exporter.model.tensors import Role

FUSED_ATTENTION = ("attn_qkv", ("attn_q", "attn_k", "attn_v"))  # one tensor, and what its rows are, in order

NAMES = TensorNames(
    {
        Role.EMBEDDING: "token_embd.weight",
        Role.FINAL_NORM: "output_norm.weight",
        Role.HEAD: "output.weight",
        Role.INPUT_NORM: "blk.{layer}.attn_norm.weight",
        Role.POST_ATTENTION_NORM: "blk.{layer}.ffn_norm.weight",
        Role.QUERY: "blk.{layer}.attn_q.weight",
        Role.KEY: "blk.{layer}.attn_k.weight",
        Role.VALUE: "blk.{layer}.attn_v.weight",
        Role.QUERY_BIAS: "blk.{layer}.attn_q.bias",
        Role.KEY_BIAS: "blk.{layer}.attn_k.bias",
        Role.VALUE_BIAS: "blk.{layer}.attn_v.bias",
        Role.OUTPUT: "blk.{layer}.attn_output.weight",
        Role.GATE: "blk.{layer}.ffn_gate.weight",
        Role.UP: "blk.{layer}.ffn_up.weight",
        Role.DOWN: "blk.{layer}.ffn_down.weight",
        Role.ROUTER: "blk.{layer}.ffn_gate_inp.weight",
        Role.EXPERT_GATE: "blk.{layer}.ffn_gate_exps.weight",
        Role.EXPERT_UP: "blk.{layer}.ffn_up_exps.weight",
        Role.EXPERT_DOWN: "blk.{layer}.ffn_down_exps.weight",
        Role.SHARED_GATE: "blk.{layer}.ffn_gate_shexp.weight",
        Role.SHARED_UP: "blk.{layer}.ffn_up_shexp.weight",
        Role.SHARED_DOWN: "blk.{layer}.ffn_down_shexp.weight",
        Role.SHARED_EXPERT_GATE: "blk.{layer}.ffn_gate_inp_shexp.weight",
    }
)
