"""A Hugging Face folder as a Checkpoint: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TensorInfo, TokenizerFiles
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, no_codes
from qwen_aot.exporter.checkpoint.hf.config import read_folder
from qwen_aot.exporter.checkpoint.hf.safetensors import SafetensorsShards
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files


class HfFolderCheckpoint:
    """A folder saved by transformers, opened for reading (see `exporter.checkpoint.base.Checkpoint`).

    Raises:
        CheckpointError: a file is missing, damaged or not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(os.path.abspath(folder))  # "." has no name
        self.config = read_folder(folder)
        self.tokenizer: TokenizerFiles = read_tokenizer_files(folder, vocab_size=self.config.vocab_size)
        self._shards = SafetensorsShards(folder)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, with the bytes' place in its file."""
        return self._shards.tensors

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
        return self._shards.read(name, rows)

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
