"""The vision tower and resampler of Qwen-VL in PyTorch, as published: the reference of every numeric test of images.

It is written from the published description and shares nothing with the exporter: the patches are a convolution, the
tower's attention takes its projection head by head, the resampler is torch.nn.MultiheadAttention, tables are resized by
torch.nn.functional.interpolate, and parameters have the checkpoint's names and layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from qwen_aot.exporter.checkpoint.base import TensorInfo, TokenizerFiles
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, no_codes
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.vision import VisionConfig

EPSILON = 1e-6
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


@dataclass(frozen=True)
class Sizes:
    """A tower, by the keys of `visual` in config.json; the published one by default."""

    image_size: int = 448
    patch_size: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_ratio: float = 4.9231
    output_dim: int = 4096
    image_start_id: int = 151857


TINY = Sizes(image_size=112, width=48, layers=3, heads=4, output_dim=256, image_start_id=90)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The projection's rows are those of head 0 (its q, k and v), then those of head 1, and so on."""
        parts = []
        for head in self.in_proj(x).chunk(self.heads, dim=-1):
            query, key, value = head.chunk(3, dim=-1)
            scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
            parts.append(scores.softmax(dim=-1) @ value)
        return self.out_proj(torch.cat(parts, dim=-1))


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(sizes.width, eps=EPSILON)
        self.ln_2 = nn.LayerNorm(sizes.width, eps=EPSILON)
        self.attn = Attention(sizes.width, sizes.heads)
        inner = int(sizes.width * sizes.mlp_ratio)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(sizes.width, inner), "c_proj": nn.Linear(inner, sizes.width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


def resize(table: Tensor, count: int) -> Tensor:
    """A table [256, N] for `count` positions."""
    side = round(count**0.5)
    if len(table) == count:
        return table
    square = table.reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
    return functional.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T


class Resampler(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        size = sizes.output_dim
        self.query = nn.Parameter(torch.zeros(256, size))
        self.pos_embed = nn.Parameter(torch.zeros(256, size))
        self.kv_proj = nn.Linear(sizes.width, size, bias=False)
        self.attn = nn.MultiheadAttention(size, size // 128, batch_first=True)
        self.ln_q = nn.LayerNorm(size, eps=EPSILON)
        self.ln_kv = nn.LayerNorm(size, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.ln_kv(self.kv_proj(x))
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        return self.attn(queries, keys + resize(self.pos_embed, x.shape[1]), keys)[0]


class Tower(nn.Module):
    """pixels [B, 3, size, size] of 0 to 255 -> [B, 256, output_dim]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        patch = sizes.patch_size
        self.conv1 = nn.Conv2d(3, sizes.width, kernel_size=patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(256, sizes.width))
        self.ln_pre = nn.LayerNorm(sizes.width, eps=EPSILON)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(sizes) for _ in range(sizes.layers))})
        self.attn_pool = Resampler(sizes)
        self.ln_post = nn.LayerNorm(sizes.output_dim, eps=EPSILON)
        self.proj = nn.Parameter(torch.zeros(sizes.output_dim, sizes.output_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        normal = ((pixels.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]).to(self.proj.dtype)
        x = self.conv1(normal).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + resize(self.positional_embedding, x.shape[1]))
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj


def make_tower(sizes: Sizes = TINY, seed: int = 0) -> Tower:
    """A tower of random weights, large enough that everything in it shows in the result."""
    tower = Tower(sizes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.1 * values + (1 if name.endswith("weight") else 0))
            elif name in ("positional_embedding", "attn_pool.pos_embed", "attn_pool.query"):
                parameter.copy_(values)
            else:
                parameter.copy_(values * parameter[0].numel() ** -0.5 * 1.5)
    return tower


def tensors_of(tower: Tower) -> dict[str, NDArray[np.float32]]:
    """By the names that a checkpoint has."""
    return {f"transformer.visual.{name}": value.detach().numpy() for name, value in tower.named_parameters()}


class ArrayCheckpoint:
    """Arrays as a checkpoint (see `exporter.checkpoint.base.Checkpoint`)."""

    path = Path("arrays")
    name = "arrays"
    source: Mapping[str, str] = {"format": "arrays", "path": "arrays", "sha256": "0" * 64}
    tokenizer = TokenizerFiles()

    def __init__(self, config: ModelConfig, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.config = config
        self.arrays = dict(arrays)
        self.tensors = {name: TensorInfo(name, array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        return self.arrays[name][rows or slice(None)]

    def read_encoded(self, name: str, rows: slice | None = None) -> EncodedRows:
        raise no_codes(self.path, name)

    def close(self) -> None:
        pass

    def __enter__(self) -> ArrayCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def seeing_config(sizes: Sizes = TINY) -> ModelConfig:
    """A small decoder's facts beside a tower's."""
    return ModelConfig(
        model_type="qwen2",
        vocab_size=max(97, sizes.image_start_id + 3),
        hidden_size=sizes.output_dim,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=sizes.output_dim // 2,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        vision=VisionConfig(**asdict(sizes)),
    )
