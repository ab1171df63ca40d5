"""VisionConfig: the facts of the vision tower and resampler of Qwen-VL, validated once.

Source of the architecture: Bai et al., "Qwen-VL" (arXiv 2308.12966), section 2, and the published config.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.model.limits import MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH, require_at_most

NUM_QUERIES = 256  # of the resampler: rows that an image becomes
GRID = 16  # both tables of positions in a checkpoint are of 16 x 16, whatever the image's size
CHANNELS = 3  # red, green, blue
LAYER_NORM_EPS = 1e-6  # of every norm of the tower and the resampler
RESAMPLER_HEAD_DIM = 128
MAX_PATCHES = 2**14  # of an image; published: 1,024. Their number squared is what attention computes

# What pixels of 0 to 1 are normalised by: CLIP's (Radford et al., arXiv 2103.00020), red, green, blue.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Facts of one tower and its resampler, spelled as under `visual` in config.json.

    Attributes:
        image_size: pixels of a side; images are made square.
        patch_size: pixels of a patch's side.
        width: of the tower's hidden state.
        layers: of the tower.
        heads: of the tower; the resampler has one for each 128 of `output_dim`.
        mlp_ratio: the width of the tower's MLP over `width`.
        output_dim: the decoder's hidden size.
        image_start_id: the token that begins an image in a prompt; behind it follow those that end one and that stand
            for its rows.

    Raises:
        CheckpointError: a value is out of range; the message names field, value and accepted range.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    output_dim: int
    image_start_id: int

    def __post_init__(self) -> None:
        for name, limit in (
            ("image_size", MAX_WIDTH),
            ("patch_size", MAX_WIDTH),
            ("width", MAX_WIDTH),
            ("layers", MAX_LAYERS),
            ("heads", MAX_WIDTH),
            ("output_dim", MAX_WIDTH),
            ("image_start_id", MAX_VOCABULARY),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise CheckpointError(f"visual.{name} is {value!r}; accepted: whole numbers from 1 to {limit}")
        if not isinstance(self.mlp_ratio, int | float) or not 0 < self.mlp_ratio <= MAX_WIDTH or not self.mlp_width:
            raise CheckpointError(
                f"visual.mlp_ratio is {self.mlp_ratio!r}; accepted: numbers that make 1 to {MAX_WIDTH} of width "
                f"({self.width})"
            )
        require_at_most("visual.width x mlp_ratio", self.mlp_width, MAX_WIDTH)
        for name, value, divisor in (
            ("image_size", self.image_size, self.patch_size),
            ("width", self.width, self.heads),
            ("output_dim", self.output_dim, RESAMPLER_HEAD_DIM),
        ):
            if value % divisor:
                raise CheckpointError(f"visual.{name} is {value}; accepted: multiples of {divisor}")
        require_at_most("visual.image_size / patch_size, squared", self.patches, MAX_PATCHES)

    @property
    def grid(self) -> int:
        """Patches of an image's side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid**2

    @property
    def mlp_width(self) -> int:
        """Of the tower's MLP, rounded down as the published code does: 1664 x 4.9231 is 8192."""
        return int(self.width * self.mlp_ratio) if math.isfinite(self.mlp_ratio) else 0

    @property
    def resampler_heads(self) -> int:
        """Attention heads of the resampler."""
        return self.output_dim // RESAMPLER_HEAD_DIM
