"""The vision tower and the resampler of Qwen-VL, written for export.

Parameters have the names and shapes of `exporter.model.vision_tensors`. As in the decoder, the residual stream, the
norms and the tables of positions are fp32 whatever the compute type is; projections and attention have that type, but
for the one projection that reads the stream without a norm between, the resampler's `kv_proj`.
Source of the architecture: the published model's description (arXiv 2308.12966) and parameters; the tower is OpenCLIP's
ViT-bigG with its own attention, the resampler one layer of cross-attention from 256 learned queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_aot.exporter.graph.modeling import Linear, Shapes
from qwen_aot.exporter.model.vision import CHANNELS, LAYER_NORM_EPS, NUM_QUERIES, VisionConfig
from qwen_aot.exporter.model.vision_tensors import vision_parameters


def _table(shapes: Shapes, name: str) -> nn.Parameter:
    return nn.Parameter(torch.empty(shapes[name], dtype=torch.float32))


class LayerNorm(nn.Module):
    """fp32 in, fp32 out; weight and bias [N] fp32."""

    def __init__(self, shapes: Shapes, name: str) -> None:
        super().__init__()
        self.weight = _table(shapes, f"{name}.weight")
        self.bias = _table(shapes, f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis of x [..., N]."""
        result: Tensor = torch.onnx.ops.symbolic(
            "LayerNormalization",
            [x, self.weight, self.bias],
            {"axis": -1, "epsilon": LAYER_NORM_EPS},
            dtype=torch.float32,
            shape=x.shape,
            version=17,
        )
        return result


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention without a mask: query [B, Q, N], key and value [B, K, N] -> [B, Q, N]; heads lie side by side in N."""
    result: Tensor = torch.onnx.ops.symbolic(
        "Attention",
        [query, key, value],
        {"q_num_heads": heads, "kv_num_heads": heads},
        dtype=query.dtype,
        shape=query.shape,
        version=23,
    )
    return result


def thirds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three equal parts of x [..., 3N]; torch's own chunk would become ops on sequences."""
    first, second, last = torch.onnx.ops.symbolic_multi_out(
        "Split",
        [x],
        {"axis": -1, "num_outputs": 3},
        dtypes=[x.dtype] * 3,
        shapes=[[*x.shape[:-1], x.shape[-1] // 3]] * 3,
        version=18,
    )
    return first, second, last


def gelu(x: Tensor) -> Tensor:
    """GELU: x times the normal distribution's function at x; exact, by erf."""
    result: Tensor = torch.onnx.ops.symbolic(
        "Gelu", [x], {"approximate": "none"}, dtype=x.dtype, shape=x.shape, version=20
    )
    return result


class VisionLayer(nn.Module):
    """Attention and MLP around an fp32 residual stream."""

    def __init__(self, config: VisionConfig, shapes: Shapes, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.heads = config.heads
        self.ln_1 = LayerNorm(shapes, "layers.0.ln_1")
        self.qkv_proj = Linear(shapes, "layers.0.qkv_proj", dtype)
        self.o_proj = Linear(shapes, "layers.0.o_proj", dtype)
        self.ln_2 = LayerNorm(shapes, "layers.0.ln_2")
        self.up_proj = Linear(shapes, "layers.0.up_proj", dtype)
        self.down_proj = Linear(shapes, "layers.0.down_proj", dtype)

    def forward(self, residual: Tensor) -> Tensor:
        """Maps the stream [B, P, width] to the same shape."""
        query, key, value = thirds(self.qkv_proj(self.ln_1(residual).to(self.dtype)))
        residual = residual + self.o_proj(attend(query, key, value, self.heads)).float()
        inner: Tensor = self.down_proj(gelu(self.up_proj(self.ln_2(residual).to(self.dtype))))
        return residual + inner.float()


class Resampler(nn.Module):
    """256 learned queries that attend to the patches: [B, P, width] -> [B, 256, M].

    Positions are added to queries and keys, and not to values. `kv_proj` is fp32: it reads the residual stream as it
    is, which in fp16 is infinite where layers wrote more than 65504 into it.
    """

    def __init__(self, config: VisionConfig, shapes: Shapes, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.heads = config.resampler_heads
        self.query = _table(shapes, "resampler.query")
        self.query_positions = _table(shapes, "resampler.query_positions")
        self.key_positions = _table(shapes, "resampler.key_positions")
        self.kv_proj = Linear(shapes, "resampler.kv_proj", torch.float32)
        self.ln_q = LayerNorm(shapes, "resampler.ln_q")
        self.ln_kv = LayerNorm(shapes, "resampler.ln_kv")
        self.q_proj = Linear(shapes, "resampler.q_proj", dtype)
        self.k_proj = Linear(shapes, "resampler.k_proj", dtype)
        self.v_proj = Linear(shapes, "resampler.v_proj", dtype)
        self.o_proj = Linear(shapes, "resampler.o_proj", dtype)

    def forward(self, x: Tensor) -> Tensor:
        """See the class; x fp32, the result in the compute type."""
        patches = self.ln_kv(self.kv_proj(x))
        query = self.q_proj((self.ln_q(self.query) + self.query_positions).to(self.dtype))
        key = self.k_proj((patches + self.key_positions).to(self.dtype))
        value = self.v_proj(patches.to(self.dtype))
        result: Tensor = self.o_proj(attend(query.expand(x.shape[0], NUM_QUERIES, -1), key, value, self.heads))
        return result


class VisionTower(nn.Module):
    """Images to rows for the decoder, with one layer in the place of all (the trace repeats it)."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {parameter.name: parameter.shape for parameter in vision_parameters(config, layers=1)}
        self.config = config
        self.dtype = dtype
        self.pixel_scale = nn.Parameter(torch.empty(CHANNELS))
        self.pixel_shift = nn.Parameter(torch.empty(CHANNELS))
        self.patch_proj = Linear(shapes, "patch_proj", dtype)
        self.positions = _table(shapes, "positions")
        self.ln_pre = LayerNorm(shapes, "ln_pre")
        self.layers = nn.ModuleList([VisionLayer(config, shapes, dtype)])
        self.resampler = Resampler(config, shapes, dtype)
        self.ln_post = LayerNorm(shapes, "ln_post")
        self.proj = nn.Parameter(torch.empty(shapes["proj"], dtype=dtype))

    def forward(self, pixels: Tensor) -> Tensor:
        """Shapes and meanings: `exporter.model.io_spec.vision_io_spec`."""
        normal = pixels * self.pixel_scale + self.pixel_shift
        residual = self.patch_proj(self._patches(normal).to(self.dtype)).float() + self.positions
        residual = self.ln_pre(residual)
        for layer in self.layers:
            residual = layer(residual)
        pooled = self.ln_post(self.resampler(residual).float())
        return torch.matmul(pooled.to(self.dtype), self.proj).float()

    def _patches(self, pixels: Tensor) -> Tensor:
        """[B, size, size, 3] -> [B, P, 3 * patch * patch], each patch laid out as the convolution's weight is."""
        grid, patch = self.config.grid, self.config.patch_size
        cut = pixels.reshape(-1, grid, patch, grid, patch, CHANNELS).permute(0, 1, 3, 5, 2, 4)
        return cut.reshape(-1, grid * grid, CHANNELS * patch * patch)
