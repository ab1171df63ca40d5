"""A Hugging Face folder as a Checkpoint: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TensorInfo, TokenizerFiles
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, no_codes
from qwen_aot.exporter.checkpoint.hf.config import read_folder
from qwen_aot.exporter.checkpoint.hf.safetensors import SafetensorsShards
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from qwen_aot.exporter.checkpoint.names import CANONICAL, TensorNames
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import WeightClass


class HfFolderCheckpoint:
    """A folder saved by transformers, opened for reading (see `exporter.checkpoint.base.Checkpoint`).

    Raises:
        CheckpointError: a file is missing, damaged or not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(os.path.abspath(folder))  # "." has no name
        self.config, architecture = read_folder(folder)
        self.tokenizer: TokenizerFiles = read_tokenizer_files(folder, vocab_size=self.config.vocab_size)
        self._shards = SafetensorsShards(folder)
        try:
            self._stored_names = _stored_names(self.path, self._shards.tensors, architecture.names)
        except CheckpointError:
            self._shards.close()
            raise
        self.config = _with_stored_biases(self.config, self._stored_names)
        self.tensors: Mapping[str, TensorInfo] = {
            name: dataclasses.replace(self._shards.tensors[stored], name=name)
            for name, stored in self._stored_names.items()
        }

    @property
    def source(self) -> Mapping[str, str]:
        """Format, folder name, SHA-256 of the header(s)."""
        return {
            "format": "safetensors",
            "path": self.path.resolve().name,
            "sha256": self._shards.header_sha256,
        }

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """A read-only view of the mapped file: one tensor, or some rows of it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self._shards.read(self._stored_names[name], rows)

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


def _stored_names(path: Path, stored_names: Iterable[str], names: TensorNames) -> dict[str, str]:
    """The name by which each tensor is given -> its name in the files; a tensor of no role keeps that."""
    result: dict[str, str] = {}
    for stored in stored_names:
        place = names.find(stored)
        name = stored if place is None else place.name
        if name in result:
            raise CheckpointError(f"{path} has {name} twice, as {result[name]} and as {stored}; accepted: one of them")
        result[name] = stored
    return result
