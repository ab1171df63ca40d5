"""Activations of an engine: an estimate from the model's facts alone."""

from __future__ import annotations

from qwen_aot.engines.planner.forms import COMPUTE_BYTES, is_blockwise
from qwen_aot.engines.spec.build_spec import IMAGES_OF_RUN, BuildSpec
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.experts import gather_limit
from qwen_aot.exporter.model.vision import NUM_QUERIES, VisionConfig
from qwen_aot.runtime.bundle.manifest import cache_capacity


def activation_bytes(config: ModelConfig, spec: BuildSpec) -> int:
    """The largest tensors that live at once in a step, in bytes: an estimate.

    The largest of a prefill step, one row of a whole chunk, of a decode step, one token of every row, and, with
    `speculate`, of a verify step, so many tokens of every row. Derived from the graph, with T = B·S tokens, R rows of
    logits (B, in a verify step T), the window W at the capacity, and c bytes an element of the compute type. Always
    alive: the residual stream [T, M] fp32, logits [R, V] fp32, and, on TensorRT without the attention
    plugin, the causal mask [B, S, W] of two bytes. On top comes the largest of

    - attention: its input [T, M], q, k and v as projected and as rotated, 2 x [T, (H + 2·Hkv)·D], and the result
      [T, H·D], in c. Scores aren't kept: ONNX Runtime's kernel fuses attention (512 tokens of 16 heads took 15 MiB of
      memory with a cache of 2,048 tokens and with one of 8,192), and so does TensorRT. TensorRT copies the window out
      of the cache, 2 x [B, W, Hkv·D]; the plugin doesn't, and its workspace, the rotated queries and the parts of
      decode attention, is within the above;
    - an MLP: its input [T, M], gate and up [T, 2F], their product [T, F], in c;
    - routed experts: every expert on every token, E x [T, 3F] or E x [T, F + M] in c, or the weights that a step of few
      tokens gathers, n·k x 3·M·F for the most tokens n that it is done for; ONNX Runtime's kernel runs each token's
      own experts, k x [T, 3F]; so does the plugin, k x [T, F] in c and k x [T, M] fp32
      (`plugins.launch.moe_workspace`);
    - the head: [R, V] in c.

    In all of these phases TensorRT has half a window's copy and its workspace for matrix products as well, and in
    attention at least that much. Found by varying one size at a time in 24 graphs: a decode step of one row takes
    4·C·Hkv·D or, where that is more, 2·C·Hkv·D + 8,192,000 bytes, and some vectors.

    ONNX Runtime's arena keeps twice that: steps of 256 tokens took 2.0 to 2.3 times the sum above in models of the
    widths of 0.5B, 7B and MoE-A2.7B. TensorRT-RTX 1.7's builder says what it will need ("Total Activation
    Memory"): this is 0.98 to 1.34 times as much in 24 dense graphs and 5 with experts (docs/planner.md).
    """
    steps = [(1, spec.prefill_chunk, 1), (spec.max_batch, 1, spec.max_batch)]
    if spec.speculate is not None:
        steps.append((spec.max_batch, spec.speculate, spec.max_batch * spec.speculate))
    return max(_step_activation_bytes(config, spec, *step) for step in steps) * spec.facts.memory.arena_factor


def _step_activation_bytes(config: ModelConfig, spec: BuildSpec, B: int, S: int, R: int) -> int:
    """The largest tensors that live at once in a step of B rows and S tokens each; see `activation_bytes`."""
    T, c = B * S, COMPUTE_BYTES[spec.combination.compute_type]
    W = cache_capacity(spec.context_for(config.max_position_embeddings), spec.prefill_chunk)
    M, V = config.hidden_size, config.vocab_size
    memory = spec.facts.memory
    is_windowed = memory.copies_window and spec.attention == "native"
    always = 4 * T * M + 4 * R * V + (2 * B * S * W if is_windowed else 0)
    projected = config.query_size + 2 * config.key_value_size
    window = 2 * c * B * W * config.key_value_size if is_windowed else 0
    aside = window // 2 + memory.workspace_bytes
    sparse = len(config.moe.sparse_layers) if config.moe is not None else 0
    attention = c * T * (M + 2 * projected + config.query_size)
    phases = [attention + max(window - aside, 0), c * R * V]
    if sparse < config.num_hidden_layers:
        phases.append(c * T * (M + 3 * config.intermediate_size))
    if config.moe is not None and sparse:
        moe = config.moe
        E, k, F = moe.num_experts, moe.num_experts_per_tok, moe.moe_intermediate_size
        phases.append(c * T * (M + 3 * moe.shared_expert_intermediate_size))
        if is_blockwise(spec):
            phases.append(c * T * (M + 3 * k * F))
        elif spec.moe == "plugin":
            phases.append(c * T * (M + k * F) + 4 * T * k * M)
        else:
            few = min(T, gather_limit(moe))
            phases += [c * (T * M + E * T * (F + max(2 * F, M))), c * (few * M + few * k * 3 * M * F)]
    return always + aside + max(phases)


def vision_activation_bytes(config: VisionConfig, spec: BuildSpec) -> int:
    """The largest tensors that live at once in a run of the vision engine, in bytes: an estimate.

    With B images, P patches and c bytes an element of the compute type: always alive is the residual stream
    [B, P, width] fp32. On top comes the largest of attention, with q, k, v and, as no fused kernel takes these heads,
    its scores [B, H, P, P], in c; an MLP, its input and twice its inner values [B, P, F], in c; and the resampler, with
    keys and values [B, P, M] and scores [B, H, 256, P], in c, beside the normalised patches [B, P, M] fp32.

    TensorRT-RTX 1.7.1's builder said 222,101,504 of a tower of the published widths for 4 images in fp16, and
    773,652,480 in fp32: this is 1.07 and 0.60 times as much. ONNX Runtime's arena is taken to keep twice that, as of a
    decoder.
    """
    B, P, M, c = IMAGES_OF_RUN, config.patches, config.output_dim, COMPUTE_BYTES[spec.combination.compute_type]
    always = 4 * B * P * config.width
    attention = c * B * (3 * P * config.width + config.heads * P**2)
    mlp = c * B * P * (config.width + 2 * config.mlp_width)
    resampler = 4 * B * P * M + c * B * (2 * P * M + config.resampler_heads * NUM_QUERIES * P)
    memory = spec.facts.memory
    return (always + memory.workspace_bytes + max(attention, mlp, resampler)) * memory.arena_factor
