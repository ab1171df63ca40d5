"""What `QwenGQA` computes, in plain PyTorch: the reference of its kernels."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Gives x [..., heads, D] with element i and i + D/2 rotated by the angle of cos, sin [..., D/2]; fp32.

    Source: RoFormer (arXiv 2104.09864), half-rotated as in Hugging Face.
    """
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos.float().unsqueeze(-2), sin.float().unsqueeze(-2)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def normalise(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Gives x [..., D] over the root of its mean square, times gain [D]; fp32. Source: transformers' `Qwen3RMSNorm`."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 like x [..., D] and scales [...] fp16, max-abs / 127 over the last axis."""
    scale = (x.float().abs().amax(dim=-1) / 127).clamp(max=torch.finfo(torch.float16).max).half()
    divisor = torch.where(scale > 0, scale.float(), 1.0).unsqueeze(-1)
    return (x.float() / divisor).round().clamp(-127, 127).to(torch.int8), scale


def gqa_reference(
    qkv: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    cache_length: torch.Tensor,
    new_tokens: torch.Tensor,
    *,
    num_heads: int,
    scale: float,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_epsilon: float = 0.0,
) -> torch.Tensor:
    """Normalises where there are norms, rotates, writes the cache in place and attends, row by row, in fp32.

    Args:
        qkv: [B, S, (H + 2·Hkv)·D] fp16 or bf16, laid q|k|v, bias added.
        key: [B, Hkv, C, D] in qkv's dtype or int8; slots cache_length … cache_length + new_tokens - 1 are written.
        value: Like key.
        key_scale: [B, Hkv, C] fp16 with an int8 cache, else None; written like key.
        value_scale: Like key_scale.
        cos: [P, D/2] fp32.
        sin: [P, D/2] fp32.
        position_ids: [B, S] int64.
        cache_length: [B] int64.
        new_tokens: [B] int64, at most S.
        num_heads: H.
        scale: Of the scores before the softmax.
        q_norm: [D] fp32, gains of the queries' norms; None: heads have no norms.
        k_norm: Like q_norm.
        norm_epsilon: Of these norms.

    Returns:
        [B, S, H·D] in qkv's dtype; zeros at and beyond a row's new_tokens.
    """
    batch, steps, _ = qkv.shape
    num_kv_heads, head_dim = key.shape[1], key.shape[3]
    output = torch.zeros(batch, steps, num_heads, head_dim, dtype=qkv.dtype)
    for b in range(batch):
        past, new = int(cache_length[b]), int(new_tokens[b])
        if new == 0:
            continue
        heads = qkv[b, :new].view(new, num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = normalise(q, q_norm, norm_epsilon), normalise(k, k_norm, norm_epsilon)
        angles = position_ids[b, :new]
        q = rotate(q, cos[angles], sin[angles]).to(qkv.dtype)
        k = rotate(k, cos[angles], sin[angles])
        written = slice(past, past + new)
        if key_scale is not None and value_scale is not None:
            key[b, :, written], key_scale[b, :, written] = quantize_int8(k.transpose(0, 1))
            value[b, :, written], value_scale[b, :, written] = quantize_int8(v.transpose(0, 1))
        else:
            key[b, :, written] = k.transpose(0, 1).to(key.dtype)
            value[b, :, written] = v.transpose(0, 1).to(value.dtype)
        keys, values = key[b, :, : past + new].float(), value[b, :, : past + new].float()
        if key_scale is not None and value_scale is not None:
            keys = keys * key_scale[b, :, : past + new].float().unsqueeze(-1)
            values = values * value_scale[b, :, : past + new].float().unsqueeze(-1)
        group = num_heads // num_kv_heads
        keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)  # [H, past+new, D]
        scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * scale  # [H, new, past+new]
        is_visible = torch.arange(past + new) <= torch.arange(past, past + new).unsqueeze(1)
        weights = scores.masked_fill(~is_visible, float("-inf")).softmax(dim=-1)
        output[b, :new] = (weights @ values).transpose(0, 1).to(qkv.dtype)
    return output.view(batch, steps, num_heads * head_dim)
