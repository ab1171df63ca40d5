"""The interface of every checkpoint reader: facts, tensors by Hugging Face name, tokenizer files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import EncodedRows, Encoding
from qwen_aot.exporter.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Where a tensor's plain little-endian, row-major bytes lie, so that external data can point at them."""

    path: Path
    offset: int  # bytes from the start of the file
    length: int  # bytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, under its Hugging Face name and in its Hugging Face layout.

    Attributes:
        dtype: what `Checkpoint.read` returns (bf16 as ml_dtypes.bfloat16; what is encoded as float32).
        span: None where the stored bytes are not the tensor itself (quantized or permuted).
        encoding: how it is stored, where that isn't plain numbers.
        encoded_bytes: of all that holds it then: codes, scales, zero points, order of columns.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    span: FileSpan | None = None
    encoding: Encoding | None = None
    encoded_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        """Of the tensor in its files."""
        return math.prod(self.shape) * self.dtype.itemsize if self.encoding is None else self.encoded_bytes


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a checkpoint says about text.

    Attributes:
        files: that go into a bundle: file name -> content. Empty without a tokenizer.
        end_tokens: tokens that any of its files calls the end of a text, as text, in order.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    end_tokens: tuple[str, ...] = ()


class Checkpoint(Protocol):
    """A checkpoint opened for reading; a context manager. Nothing is loaded until `read`."""

    @property
    def path(self) -> Path:
        """The folder or file that was opened."""

    @property
    def name(self) -> str:
        """What the model is called (`exporter.checkpoint.model_name`)."""

    @property
    def config(self) -> ModelConfig:
        """The model's facts."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by Hugging Face name (`model.layers.0.self_attn.q_proj.weight`, ...)."""

    @property
    def source(self) -> Mapping[str, str]:
        """Where the weights come from: `format`, `path` (`name`), `sha256` of the header(s).

        Of a snapshot of a hub's cache `repository` and `revision` as well.
        """

    @property
    def tokenizer(self) -> TokenizerFiles:
        """tokenizer.json, tokenizer_config.json (with chat_template), generation_config.json if present."""

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """One tensor, or some rows (axis 0) of it, as an array of `tensors[name].dtype`.

        Memory-mapped where possible; the caller doesn't write into it.

        Raises:
            CheckpointError: the tensor is missing or its bytes can't be read.
        """

    def read_encoded(self, name: str, rows: slice | None = None) -> EncodedRows:
        """A tensor, or some rows of it, as the codes that are stored; `read` gives what `dequantize` makes of them.

        Raises:
            CheckpointError: the tensor is missing, or its encoding has no form that can be read as codes.
        """

    def close(self) -> None:
        """Releases the mappings; arrays already returned must not be used afterwards."""

    def __enter__(self) -> Checkpoint: ...

    def __exit__(self, *exc: object) -> None: ...


def encodings_of(checkpoint: Checkpoint) -> Mapping[str, Encoding]:
    """How the tensors are stored that aren't plain numbers, by name."""
    return {name: info.encoding for name, info in checkpoint.tensors.items() if info.encoding is not None}
