"""Small random models that see: transformers' decoder, the tower of `tests.vision_reference`, a checkpoint of both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2ForCausalLM, Qwen2MoeForCausalLM

from qwen_aot.exporter.checkpoint.base import TokenizerFiles
from qwen_aot.exporter.checkpoint.hf.config import read_folder
from qwen_aot.exporter.model.vision import VisionConfig
from tests.checkpoints import save_tiny
from tests.vision_reference import TINY, ArrayCheckpoint, Sizes, Tower, make_tower, tensors_of

IMAGE_TOKENS = ("<img>", "</img>", "<imgpad>")
BOX_TOKENS = ("<ref>", "</ref>", "<box>", "</box>")
VOCABULARY = 340


@dataclasses.dataclass(frozen=True)
class SeeingModel:
    """A checkpoint, and the two models that it was made of."""

    checkpoint: ArrayCheckpoint
    decoder: Qwen2ForCausalLM | Qwen2MoeForCausalLM
    tower: Tower

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.checkpoint.tokenizer.files["tokenizer.json"])

    def rows(self, pixels: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """[B, 256, M] of images [size, size, 3]."""
        with torch.no_grad():
            rows: torch.Tensor = self.tower(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float())
        return rows

    def greedy(self, ids: list[int], images: Sequence[tuple[int, NDArray[np.uint8]]], count: int) -> list[int]:
        """What the models say greedily, without a cache; an image's rows stand from its place on."""
        rows = self.rows([pixels for _, pixels in images]) if images else None
        said: list[int] = []
        for _ in range(count):
            with torch.no_grad():
                embeddings = self.decoder.get_input_embeddings()(torch.tensor([ids + said]))
                for index, (start, _) in enumerate(images):
                    assert rows is not None
                    embeddings[0, start : start + 256] = rows[index]
                logits = self.decoder(inputs_embeds=embeddings).logits
            said.append(int(logits[0, -1].argmax()))
        return said


def make_seeing_model(folder: Path, sizes: Sizes = TINY, *, seed: int = 0, tied: bool = False) -> SeeingModel:
    """A model whose decoder reads rows of its tower; rows are scaled to the size of its embeddings."""
    size = sizes.output_dim
    decoder = save_tiny(
        folder,
        with_tokenizer=True,
        vocab=VOCABULARY - len(IMAGE_TOKENS) - len(BOX_TOKENS),
        hidden=size,
        heads=4,
        kv_heads=4,
        head_dim=size // 4,
        tied=tied,
        seed=seed,
        max_position_embeddings=1024,
    )
    decoder.resize_token_embeddings(VOCABULARY)
    with torch.no_grad():
        for table in (decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight):
            generator = torch.Generator().manual_seed(seed + 1)
            table[-len(IMAGE_TOKENS) - len(BOX_TOKENS) :] = (
                torch.randn(len(IMAGE_TOKENS) + len(BOX_TOKENS), size, generator=generator) * size**-0.5
            )
    tower = make_tower(sizes, seed)
    with torch.no_grad():
        tower.proj *= 0.1
    config, _ = read_folder(folder)
    config = dataclasses.replace(config, vocab_size=VOCABULARY, vision=VisionConfig(**dataclasses.asdict(sizes)))
    arrays = {name: value.detach().numpy() for name, value in decoder.state_dict().items()}
    if tied:
        arrays.pop("lm_head.weight", None)
    checkpoint = ArrayCheckpoint(config, arrays | tensors_of(tower))
    checkpoint.tokenizer = TokenizerFiles(_tokenizer_files(folder), ("<|im_end|>",))
    return SeeingModel(checkpoint, decoder, tower)


def _tokenizer_files(folder: Path) -> dict[str, str]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(IMAGE_TOKENS))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in BOX_TOKENS])
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config),
        "generation_config.json": json.dumps({"eos_token_id": tokenizer.token_to_id("<|im_end|>")}),
    }
