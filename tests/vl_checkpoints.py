"""Small random Qwen-VL folders, and what the published architecture says of them: two statements put together.

The decoder is `tests.first_qwen.Statement`, the tower `tests.vision_reference.Tower`. Rows of images are further rows
of the decoder's table of embeddings, so that a text with images is a list of ids like any other.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.first_qwen import CONFIG, Statement, save_folder
from tests.vision_reference import TINY, Sizes, Tower, make_tower, tensors_of

LAYERS, HEADS, WIDTH, VOCAB = 2, 4, 96, 512
SEQ_LENGTH = 256  # an image alone is longer: log-n scaling and dynamic NTK matter at once
ROWS = 256
MERGES = (b"th", b"the", b" c", b"at")
FIRST_SPECIAL = 256 + len(MERGES)
IM_START, IM_END = FIRST_SPECIAL + 1, FIRST_SPECIAL + 2
IMAGE_START = FIRST_SPECIAL + 208 + 6

SMALL = Sizes(
    image_size=TINY.image_size, width=48, layers=2, heads=4, mlp_ratio=3.0, output_dim=128, image_start_id=IMAGE_START
)
Placed = tuple[int, NDArray[np.uint8]]  # the first token of an image's rows, and its pixels [size, size, 3]


def ranks_file() -> str:
    """A qwen.tiktoken of single bytes and a few words."""
    tokens = [bytes([byte]) for byte in range(256)] + list(MERGES)
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def make_config(sizes: Sizes = SMALL) -> dict[str, Any]:
    return {
        **CONFIG,
        "hidden_size": sizes.output_dim,
        "intermediate_size": 2 * WIDTH,
        "kv_channels": sizes.output_dim // HEADS,
        "max_position_embeddings": 2048,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "seq_length": SEQ_LENGTH,
        "torch_dtype": "float32",
        "visual": asdict(sizes),
        "vocab_size": VOCAB,
    }


def make_decoder(size: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights by their names in files, of a model whose answers depend on all that it has read."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (1.5 * shape[-1] ** -0.5 * random.standard_normal(shape)).astype(np.float32)

    def vector(count: int, middle: float = 0.0) -> NDArray[np.float32]:
        return (middle + 0.2 * random.standard_normal(count)).astype(np.float32)

    weights = {
        "transformer.wte.weight": random.standard_normal((VOCAB, size)).astype(np.float32),
        "transformer.ln_f.weight": vector(size, 1),
        "lm_head.weight": normal(VOCAB, size),
    }
    for layer in range(LAYERS):
        weights |= {
            f"transformer.h.{layer}.{name}": value
            for name, value in {
                "ln_1.weight": vector(size, 1),
                "attn.c_attn.weight": normal(3 * size, size),
                "attn.c_attn.bias": vector(3 * size),
                "attn.c_proj.weight": normal(size, size),
                "ln_2.weight": vector(size, 1),
                "mlp.w1.weight": normal(WIDTH, size),
                "mlp.w2.weight": normal(WIDTH, size),
                "mlp.c_proj.weight": normal(size, WIDTH),
            }.items()
        }
    return weights


@dataclass(frozen=True)
class SeeingModel:
    """A folder, and what its weights say."""

    folder: Path
    weights: Mapping[str, NDArray[np.float32]]
    config: Mapping[str, Any]
    tower: Tower = field(repr=False)

    def rows(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """[B, 256, M]."""
        with torch.no_grad():
            rows: NDArray[np.float32] = self.tower(
                torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
            ).numpy()
        return rows

    def _as_text(self, ids: Sequence[int], images: Sequence[Placed]) -> tuple[Statement, list[int]]:
        rows = self.rows([pixels for _, pixels in images]) if images else np.zeros((0, ROWS, 1), np.float32)
        table = self.weights["transformer.wte.weight"]
        text = list(ids)
        for index, (start, _) in enumerate(images):
            first = VOCAB + index * ROWS
            text[start : start + ROWS] = range(first, first + ROWS)
        if images:
            table = np.concatenate([table, rows.reshape(-1, table.shape[1])])
        return Statement({**self.weights, "transformer.wte.weight": table}, self.config), text

    def logits(self, ids: Sequence[int], images: Sequence[Placed] = ()) -> NDArray[np.float64]:
        """[V] behind a prompt."""
        statement, text = self._as_text(ids, images)
        result: NDArray[np.float64] = statement.logits(text)[-1]
        return result

    def greedy(self, ids: Sequence[int], images: Sequence[Placed], count: int) -> list[int]:
        """The likeliest tokens one after the other."""
        statement, text = self._as_text(ids, images)
        return statement.greedy(text, count)


def make_seeing_model(
    folder: Path, sizes: Sizes = SMALL, *, seed: int = 0, generation: Mapping[str, Any] | None = None
) -> SeeingModel:
    """Saves a folder as Qwen-VL-Chat's is: config.json, weights, qwen.tiktoken, generation_config.json."""
    decoder, tower = make_decoder(sizes.output_dim, seed), make_tower(sizes, seed)
    files = {
        "qwen.tiktoken": ranks_file(),
        "generation_config.json": json.dumps({"chat_format": "chatml", **(generation or {})}),
    }
    save_folder(folder, decoder | tensors_of(tower), config=make_config(sizes), files=files)
    return SeeingModel(folder, decoder, make_config(sizes), tower)


def read_seeing_model(folder: Path, sizes: Sizes = SMALL, *, seed: int = 0) -> SeeingModel:
    """One that `make_seeing_model` has saved with these arguments."""
    return SeeingModel(folder, make_decoder(sizes.output_dim, seed), make_config(sizes), make_tower(sizes, seed))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An image file of pixels [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Pixels [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
