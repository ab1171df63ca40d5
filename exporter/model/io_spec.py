"""Engine inputs and outputs: the one place for their names, dimensions and dtypes.

Dimensions are sizes or letters: B rows, S new tokens in this step, C cache capacity in tokens, W attention window,
T last tokens of a row that a step gives the logits of, I rows that a step takes from images.
Every row, padded and idle ones too, has `cache_length + S <= C`, and W is at least the largest `cache_length + S`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.vision import CHANNELS, NUM_QUERIES, VisionConfig

Dim = int | str

IMAGE_EMBEDDINGS, IMAGE_POSITIONS = "image_embeddings", "image_positions"  # of models with a vision tower
ROTARY_OFFSET = "rotary_offset"  # of graphs with several rotary tables; the name goes on with a number

CACHE_SCALE_DTYPE = ir.DataType.FLOAT16  # of an int8 cache


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and dimensions of one engine input or output."""

    name: str
    dtype: ir.DataType
    dims: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class IoSpec:
    """All inputs and outputs in graph order.

    `past[i]` and `present[i]` are layer i's (key, value), or (key, value, key_scale, value_scale) of an int8 cache.
    `last_logits` is None where a step gives the logits of each row's last token only.
    """

    step: tuple[TensorSpec, ...]
    past: tuple[tuple[TensorSpec, ...], ...]
    logits: TensorSpec
    last_logits: TensorSpec | None
    present: tuple[tuple[TensorSpec, ...], ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Step inputs, then past keys and values, layer by layer."""
        return self.step + tuple(spec for parts in self.past for spec in parts)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Logits, those of the last tokens if there are any, then present keys and values, layer by layer."""
        logits = (self.logits,) if self.last_logits is None else (self.logits, self.last_logits)
        return logits + tuple(spec for parts in self.present for spec in parts)


def io_spec(
    config: ModelConfig,
    cache_dtype: ir.DataType,
    capacity: int | None = None,
    *,
    speculates: bool = False,
    rotary_length: int | None = None,
) -> IoSpec:
    """The contract between exporter, engines and runtime.

    Args:
        config: the model.
        cache_dtype: element type of past and present.
        capacity: C in tokens where the target fixes it at build time; None leaves it dynamic.
        speculates: a step can give the logits of each row's last tokens, so that drafted tokens are checked at once.
        rotary_length: `ModelConfig.dynamic_ntk_length` where the graph has several rotary tables; None: it has one.

    Returns:
        input_ids [B, S] int64 (right-padded); position_ids [B, S] int64 (`cache_length[b] + s`, padding included);
        cache_length [B] int64 (valid tokens already cached); new_tokens [B] int64 (valid tokens among S; 0 = idle
        row); key_positions [W] int64 (0 … W-1); past_key_values.{i}.key/.value and present.{i}.key/.value
        [B, Hkv, C, D], of an int8 cache also past_key_values.{i}.key_scale/.value_scale and present.{i}.… [B, Hkv, C]
        float16; logits [B, V] float32 of each row's last valid token. With `speculates` also logits_positions [T]
        int64 (0 … T-1; only as many rows of the head are computed as it is long) and last_logits [B, T, V] float32 of
        each row's last T valid tokens, the newest last; a row of n < T new tokens has its own in the last n. With
        `rotary_length` also rotary_offset.{rotary_length} [B] int64: the first row of the rotary table of each row.
        Of a model with a vision tower also image_embeddings [I, M] float32, of which a step without images has one row
        that nothing reads, and image_positions [B, S] int64: the row of them that stands in the place of the token's
        embedding, -1: none does.
    """
    int64 = ir.DataType.INT64
    cache_dims: tuple[Dim, ...] = ("B", config.num_key_value_heads, capacity or "C", config.head_dim)

    def cache(prefix: str, layer: int) -> tuple[TensorSpec, ...]:
        specs = [TensorSpec(f"{prefix}.{layer}.{part}", cache_dtype, cache_dims) for part in ("key", "value")]
        if cache_dtype == ir.DataType.INT8:
            specs += [TensorSpec(f"{spec.name}_scale", CACHE_SCALE_DTYPE, cache_dims[:3]) for spec in specs]
        return tuple(specs)

    layers = range(config.num_hidden_layers)
    positions = (TensorSpec("logits_positions", int64, ("T",)),) if speculates else ()
    offset = () if rotary_length is None else (TensorSpec(f"{ROTARY_OFFSET}.{rotary_length}", int64, ("B",)),)
    images = (
        ()
        if config.vision is None
        else (
            TensorSpec(IMAGE_EMBEDDINGS, ir.DataType.FLOAT, ("I", config.hidden_size)),
            TensorSpec(IMAGE_POSITIONS, int64, ("B", "S")),
        )
    )
    return IoSpec(
        step=(
            TensorSpec("input_ids", int64, ("B", "S")),
            TensorSpec("position_ids", int64, ("B", "S")),
            TensorSpec("cache_length", int64, ("B",)),
            TensorSpec("new_tokens", int64, ("B",)),
            TensorSpec("key_positions", int64, ("W",)),
            *positions,
            *offset,
            *images,
        ),
        past=tuple(cache("past_key_values", layer) for layer in layers),
        logits=TensorSpec("logits", ir.DataType.FLOAT, ("B", config.vocab_size)),
        last_logits=(
            TensorSpec("last_logits", ir.DataType.FLOAT, ("B", "T", config.vocab_size)) if speculates else None
        ),
        present=tuple(cache("present", layer) for layer in layers),
    )


@dataclass(frozen=True, slots=True)
class VisionIoSpec:
    """The vision engine's inputs and outputs."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def vision_io_spec(config: VisionConfig) -> VisionIoSpec:
    """The contract of the vision engine.

    Returns:
        pixels [B, size, size, 3] float32: B square images, row by row, each pixel red, green, blue of 0 to 255;
        image_embeddings [B, 256, M] float32: what stands in the place of each image's tokens.
    """
    size = config.image_size
    return VisionIoSpec(
        inputs=(TensorSpec("pixels", ir.DataType.FLOAT, ("B", size, size, CHANNELS)),),
        outputs=(TensorSpec("image_embeddings", ir.DataType.FLOAT, ("B", NUM_QUERIES, config.output_dim)),),
    )
