"""A Hugging Face folder as a Checkpoint: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.adapters import refuse_adapter_tensors
from qwen_aot.exporter.checkpoint.base import TensorInfo, TokenizerFiles
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, no_codes
from qwen_aot.exporter.checkpoint.hf.config import read_folder
from qwen_aot.exporter.checkpoint.hf.fused_experts import separate
from qwen_aot.exporter.checkpoint.hf.quantized_files import refuse_quantized_folder
from qwen_aot.exporter.checkpoint.hf.safetensors import SafetensorsShards
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from qwen_aot.exporter.checkpoint.hf.wrappers import unwrapped
from qwen_aot.exporter.checkpoint.model_name import folder_name, located, origin
from qwen_aot.exporter.checkpoint.names import CANONICAL, TensorNames
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role, WeightClass


class HfFolderCheckpoint:
    """A folder saved by transformers, opened for reading (see `exporter.checkpoint.base.Checkpoint`).

    Raises:
        CheckpointError: a file is missing, damaged or not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = located(folder)
        self.name = folder_name(folder)
        self.config, architecture = read_folder(folder)
        refuse_quantized_folder(folder)
        self.tokenizer: TokenizerFiles = read_tokenizer_files(folder, vocab_size=self.config.vocab_size)
        self._shards = SafetensorsShards(folder)
        try:
            self.tensors: Mapping[str, TensorInfo] = _by_role(
                self.path, self._shards.tensors, architecture.names, self.config
            )
        except CheckpointError:
            self._shards.close()
            raise
        self.config = _with_stored_biases(self.config, self.tensors)

    @property
    def source(self) -> Mapping[str, str]:
        """Format, the model's name, SHA-256 of the header(s); of a hub's snapshot its repository and revision."""
        return {
            "format": "safetensors",
            "path": self.name,
            "sha256": self._shards.header_sha256,
            **origin(self.path),
        }

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """A read-only view of the mapped file: one tensor, or some rows of it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self._shards.view(self.tensors[name], rows)

    def read_encoded(self, name: str, rows: slice | None = None) -> EncodedRows:
        """Refuses: every tensor here is plain numbers.

        Raises:
            CheckpointError: always.
        """
        raise no_codes(self.path, name)

    def close(self) -> None:
        """Unmaps the files."""
        self._shards.close()

    def __enter__(self) -> HfFolderCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _with_stored_biases(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The facts of a dense model whose config.json denies the biases that its files hold.

    transformers gives q, k and v of `qwen2` biases whatever `attention_bias` says; the key is of other architectures.
    """
    if config.model_type != "qwen2" or config.attention_bias:
        return config
    places = (CANONICAL.find(name) for name in names)
    has_biases = any(place is not None and place.role.weight_class is WeightClass.BIAS for place in places)
    return dataclasses.replace(config, attention_bias=has_biases)


def _by_role(
    path: Path, stored: Mapping[str, TensorInfo], names: TensorNames, config: ModelConfig
) -> dict[str, TensorInfo]:
    """Each tensor by the name by which it is given: its role's; a tensor of no role keeps its own.

    Raises:
        CheckpointError: two are one, or the names are an adapter's, or another architecture's.
    """
    refuse_adapter_tensors(path, stored)
    result: dict[str, TensorInfo] = {}
    first: dict[str, str] = {}
    for old, plain in unwrapped(path, stored, names).items():
        for each, info in separate(path, plain, stored[old], config):
            place = names.find(each)
            if place is None and CANONICAL.find(each) is not None:
                # Given under its own name it would be taken for what transformers means by it.
                raise CheckpointError(
                    f"{path}: tensor {old} is called as in a qwen2 checkpoint, and config.json says "
                    "another architecture, whose files don't have it; take it out, or correct model_type"
                )
            name = each if place is None else place.name
            if first.setdefault(name, old) != old or name in result:
                raise CheckpointError(f"{path} has {name} twice, as {first[name]} and as {old}; accepted: one of them")
            result[name] = dataclasses.replace(info, name=name)
    return _with_embedding(result, config)


def _with_embedding(tensors: dict[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """The embedding of a tied model under its own name, where only the head's was saved.

    safetensors' `save_model` (so do trainers) keeps the first name, by the alphabet, of tensors that share memory.
    """
    head, embedding = Role.HEAD.tensor_name(), Role.EMBEDDING.tensor_name()
    if config.tie_word_embeddings and head in tensors and embedding not in tensors:
        tensors[embedding] = dataclasses.replace(tensors.pop(head), name=embedding)
    return tensors
