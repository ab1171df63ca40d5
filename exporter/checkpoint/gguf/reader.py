"""A GGUF file as a Checkpoint: Hugging Face names, rotary order and per-expert tensors, read row by row.

The `gguf` package dequantizes; this module maps names, undoes layouts and bounds memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import FileSpan, TensorInfo, TokenizerFiles
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, no_codes
from qwen_aot.exporter.checkpoint.gguf.codes import QUANTIZED, decode, encoding_of
from qwen_aot.exporter.checkpoint.gguf.config import parse
from qwen_aot.exporter.checkpoint.gguf.header import GgufTensor
from qwen_aot.exporter.checkpoint.gguf.names import FUSED_ATTENTION, NAMES
from qwen_aot.exporter.checkpoint.gguf.parts import GgufFiles, open_files
from qwen_aot.exporter.checkpoint.gguf.tokenizer import tokenizer_files
from qwen_aot.exporter.checkpoint.mapped import MappedFile
from qwen_aot.exporter.checkpoint.model_name import file_name, located, origin
from qwen_aot.exporter.checkpoint.names import Place
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role, WeightClass

_PLAIN: Mapping[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_SUPPORTED = (*_PLAIN, *QUANTIZED)

_ROTARY = (Role.QUERY, Role.KEY, Role.QUERY_BIAS, Role.KEY_BIAS)
_CHUNK_ELEMENTS = 4 << 20  # dequantized at once: the gguf package takes several times that in temporaries


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where and how one Hugging Face tensor lies in a file."""

    file: MappedFile
    tensor: GgufTensor
    rotary_head_dim: int = 0  # not 0: rows of each head lie as [D/2, 2] instead of [2, D/2]


class GgufCheckpoint:
    """A `.gguf` file, or a split one by any of its parts (see `exporter.checkpoint.base.Checkpoint`).

    Quantized tensors are read as float32, or as codes; the bytes of rows and experts that aren't asked for aren't
    touched.

    Raises:
        CheckpointError: a file is damaged or missing, or its architecture, tensor type or tokenizer is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = located(path)
        self.name = file_name(path)
        self._files = open_files(self.path)
        try:
            self.config, self._stored, self.tokenizer = _interpret(self.path, self._files)
        except CheckpointError:
            self._files.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {name: _info(name, stored) for name, stored in self._stored.items()}

    @property
    def source(self) -> Mapping[str, str]:
        """Format, file name, SHA-256 of everything before the tensors' data; a hub's repository and revision."""
        return {"format": "gguf", "path": self.name, "sha256": self._files.sha256, **origin(self.path.parent)}

    def read(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """One tensor, or some rows of it: a view where the stored bytes are the tensor, else a new array.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._stored:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        stored = self._stored[name]
        tensor = stored.tensor
        if tensor.type not in _PLAIN:
            return _dequantize(stored, rows)
        dtype = _PLAIN[tensor.type]
        if not stored.rotary_head_dim:
            return stored.file.view(tensor.offset, tensor.shape, dtype, rows)
        return stored.file.view(tensor.offset, tensor.shape, dtype, None)[_row_index(stored, rows)]

    def read_encoded(self, name: str, rows: slice | None = None) -> EncodedRows:
        """A tensor, or some rows of it, as codes and scales, in the rows' Hugging Face order.

        Raises:
            CheckpointError: there is no such tensor, or it is plain numbers.
        """
        if name not in self._stored or self._stored[name].tensor.type in _PLAIN:
            raise no_codes(self.path, name)
        stored = self._stored[name]
        return decode(_coded_rows(stored)[_row_index(stored, rows)], stored.tensor.type)

    def close(self) -> None:
        """Unmaps the files."""
        self._files.close()

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _dequantize(stored: _Stored, rows: slice | None) -> NDArray[np.float32]:
    tensor = stored.tensor
    coded = _coded_rows(stored)
    index = _row_index(stored, rows)
    result = np.empty((len(index), *tensor.shape[1:]), np.float32)
    step = max(1, _CHUNK_ELEMENTS // math.prod(tensor.shape[1:]))
    for start in range(0, len(index), step):
        chunk = coded[index[start : start + step]]
        values = gguf.dequantize(chunk, tensor.type)
        result[start : start + step] = values.reshape(-1, *tensor.shape[1:])
    return result


def _coded_rows(stored: _Stored) -> NDArray[np.uint8]:
    """A quantized tensor's rows as they are stored [rows, bytes]."""
    tensor = stored.tensor
    return stored.file.view(tensor.offset, (tensor.shape[0], tensor.row_bytes), np.dtype(np.uint8), None)


def _info(name: str, stored: _Stored) -> TensorInfo:
    tensor = stored.tensor
    span = None
    if tensor.type in _PLAIN and not stored.rotary_head_dim:
        span = FileSpan(stored.file.path, tensor.offset, tensor.shape[0] * tensor.row_bytes)
    if tensor.type in _PLAIN:
        return TensorInfo(name, tensor.shape, _PLAIN[tensor.type], span)
    return TensorInfo(
        name,
        tensor.shape,
        np.dtype(np.float32),
        encoding=encoding_of(tensor.type),
        encoded_bytes=tensor.shape[0] * tensor.row_bytes,
    )


def _interpret(path: Path, files: GgufFiles) -> tuple[ModelConfig, Mapping[str, _Stored], TokenizerFiles]:
    """What the header says about model, tensors (by Hugging Face name) and tokenizer."""
    try:
        if files.metadata.get("general.type") == "adapter":
            raise CheckpointError(
                "this is an adapter (general.type), not a model; accepted: a whole model. Merge the adapter into its "
                "model first (llama.cpp's `llama-export-lora`)"
            )
        config = parse(files.metadata, {name: tensor.shape for name, (_, tensor) in files.tensors.items()})
        for name, (_, tensor) in files.tensors.items():
            if tensor.type not in _SUPPORTED:
                accepted = ", ".join(each.name for each in _SUPPORTED)
                raise CheckpointError(
                    f"tensor {name!r} is of type {tensor.type.name}; not supported; accepted: {accepted}"
                )
        rotary = config.head_dim if files.metadata["general.architecture"] == "llama" else 0
        return (
            config,
            dict(_to_hugging_face(_apart(files.tensors, config), rotary)),
            tokenizer_files(files.metadata, vocab_size=config.vocab_size),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _apart(
    tensors: Mapping[str, tuple[MappedFile, GgufTensor]], config: ModelConfig
) -> dict[str, tuple[MappedFile, GgufTensor]]:
    """The tensors, those that hold queries, keys and values as each of these."""
    fused, parts = FUSED_ATTENTION
    rows = (config.query_size, config.key_value_size, config.key_value_size)
    result: dict[str, tuple[MappedFile, GgufTensor]] = {}
    for name, (file, tensor) in tensors.items():
        if f".{fused}." not in name:
            result[name] = (file, tensor)
            continue
        if tensor.shape[0] != sum(rows):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)}; accepted: {sum(rows)} rows, which are queries, keys "
                "and values"
            )
        # A vector's elements are its rows, whose bytes a plain type alone has apart.
        offset = tensor.offset
        for part, count in zip(parts, rows, strict=True):
            result[name.replace(fused, part)] = (file, GgufTensor(offset, (count, *tensor.shape[1:]), tensor.type))
            offset += count * tensor.row_bytes
    return result


def _to_hugging_face(
    tensors: Mapping[str, tuple[MappedFile, GgufTensor]], rotary_head_dim: int
) -> Iterator[tuple[str, _Stored]]:
    for name, (file, tensor) in tensors.items():
        place = NAMES.find(name)
        if place is None:
            raise CheckpointError(f"tensor {name!r} is not one of a Qwen or llama decoder; not supported")
        if place.role.weight_class is WeightClass.EXPERT:
            yield from _experts(name, place, file, tensor)
        elif place.role is Role.SHARED_EXPERT_GATE and len(tensor.shape) == 1:
            yield place.name, _Stored(file, GgufTensor(tensor.offset, (1, *tensor.shape), tensor.type))
        elif rotary_head_dim and place.role in _ROTARY:
            if tensor.shape[0] % rotary_head_dim:
                raise CheckpointError(
                    f"tensor {name!r} has {tensor.shape[0]} rows, not whole heads of {rotary_head_dim}"
                )
            yield place.name, _Stored(file, tensor, rotary_head_dim)
        else:
            yield place.name, _Stored(file, tensor)


def _experts(name: str, place: Place, file: MappedFile, tensor: GgufTensor) -> Iterator[tuple[str, _Stored]]:
    """[E, out, in] -> E tensors [out, in] whose bytes lie one after the other."""
    if len(tensor.shape) != 3:
        raise CheckpointError(f"tensor {name!r} has shape {list(tensor.shape)}; accepted: [experts, out, in]")
    for expert in range(tensor.shape[0]):
        offset = tensor.offset + expert * tensor.row_bytes
        yield (
            place.role.tensor_name(place.layer, expert),
            _Stored(file, GgufTensor(offset, tensor.shape[1:], tensor.type)),
        )


def _row_index(stored: _Stored, rows: slice | None) -> NDArray[np.int64]:
    """The stored row of each requested row: llama files keep the two halves of a head interleaved."""
    index = np.arange(stored.tensor.shape[0])
    if stored.rotary_head_dim:
        index = index.reshape(-1, stored.rotary_head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return index if rows is None else index[rows]
