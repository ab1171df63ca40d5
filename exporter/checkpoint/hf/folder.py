"""A Hugging Face folder as a Checkpoint: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.adapters import refuse_adapter_tensors
from qwen_aot.exporter.checkpoint.base import TensorInfo, TokenizerFiles
from qwen_aot.exporter.checkpoint.encoding import EncodedRows, no_codes
from qwen_aot.exporter.checkpoint.hf.architectures import Architecture
from qwen_aot.exporter.checkpoint.hf.config import read_folder
from qwen_aot.exporter.checkpoint.hf.quantized.collect import WEIGHT, Parts, collect, placeholder_biases, stored_linear
from qwen_aot.exporter.checkpoint.hf.quantized.linear import QuantizedLinear, read_codes, read_values
from qwen_aot.exporter.checkpoint.hf.quantized.row_span import separate_rows, stored_bytes
from qwen_aot.exporter.checkpoint.hf.quantized.settings import Quantization, read_quantization
from qwen_aot.exporter.checkpoint.hf.safetensors import SafetensorsShards
from qwen_aot.exporter.checkpoint.hf.tokenizer import read_tokenizer_files
from qwen_aot.exporter.checkpoint.hf.wrappers import unwrapped
from qwen_aot.exporter.checkpoint.model_name import folder_name, located, origin
from qwen_aot.exporter.checkpoint.names import CANONICAL
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role, WeightClass, tensor_shapes

_FLOAT32 = np.dtype("<f4")


class HfFolderCheckpoint:
    """A folder saved by transformers, opened for reading (see `exporter.checkpoint.base.Checkpoint`).

    Linears that are quantized are given under their weights' names, as float32 or as codes.

    Raises:
        CheckpointError: a file is missing, damaged or not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = located(folder)
        self.name = folder_name(folder)
        self.config, architecture = read_folder(folder)
        quantization = read_quantization(folder)
        self.tokenizer: TokenizerFiles = read_tokenizer_files(
            folder, vocab_size=self.config.vocab_size, takes_images=self.config.vision is not None
        )
        self._shards = SafetensorsShards(folder, is_quantized=quantization is not None)
        try:
            stored = self._shards.tensors
            refuse_adapter_tensors(self.path, stored)
            modules = {} if quantization is None else collect(stored, quantization)
            tensors, given = _by_role(self.path, _with_weights(stored, modules), architecture, self.config)
            self.config = _with_stored_biases(self.config, tensors)
            linears = [] if quantization is None else self._open_linears(quantization, modules, tensors, given)
        except CheckpointError:
            self._shards.close()
            raise
        self._linears: Mapping[str, QuantizedLinear] = {linear.stored.weight: linear for linear in linears}
        self.tensors: Mapping[str, TensorInfo] = tensors | {
            weight: TensorInfo(
                weight,
                linear.stored.shape,
                _FLOAT32,
                encoding=linear.encoding,
                encoded_bytes=stored_bytes(linear),
            )
            for weight, linear in self._linears.items()
        }

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
        """One tensor, or some rows of it: a read-only view of the mapped file, or floats made of codes.

        Raises:
            CheckpointError: there is no such tensor, or a scale isn't a finite number.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        if name in self._linears:
            return read_values(self._linears[name], rows)
        return self._shards.view(self.tensors[name], rows)

    def read_encoded(self, name: str, rows: slice | None = None) -> EncodedRows:
        """A quantized linear, or some rows of it, as the codes, scales and zero points of the file.

        Raises:
            CheckpointError: there is no such tensor, it is plain numbers, or a scale isn't a finite number.
        """
        if name not in self._linears:
            raise no_codes(self.path, name)
        return read_codes(self._linears[name], rows)

    def close(self) -> None:
        """Unmaps the files."""
        self._shards.close()

    def _open_linears(
        self,
        quantization: Quantization,
        modules: Mapping[str, Parts],
        tensors: dict[str, TensorInfo],
        given: Mapping[str, Sequence[str]],
    ) -> list[QuantizedLinear]:
        """Checks all quantized linears, and takes placeholder biases out of `tensors`."""
        view, stored = self._shards.view, self._shards.tensors
        shapes = tensor_shapes(self.config)
        linear_shapes = dict(shapes)
        if not quantization.format.has_tables:
            del linear_shapes[Role.EMBEDDING.tensor_name()]
        try:
            linears = [
                stored_linear(module, given[module + WEIGHT], parts, linear_shapes, view)
                for module, parts in modules.items()
            ]
            of_model = {old for old, names in given.items() if names[0] in shapes}
            for name in placeholder_biases(linears, stored, of_model, view):
                del tensors[given[name][0]]
            opened = quantization.format.open_linears(linears, quantization.settings)
            return [
                part
                for linear in opened
                for part in separate_rows(linear, given[linear.stored.name + WEIGHT], linear_shapes)
            ]
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

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


def _with_weights(stored: Mapping[str, TensorInfo], modules: Mapping[str, Parts]) -> dict[str, TensorInfo]:
    """The stored tensors, with one weight in the place of each quantized module's; its shape isn't known yet."""
    parts = {info.name for each in modules.values() for info in each.values()}
    weights = {module + WEIGHT: TensorInfo(module + WEIGHT, (), _FLOAT32) for module in modules}
    return {name: info for name, info in stored.items() if name not in parts} | weights


def _by_role(
    path: Path, stored: Mapping[str, TensorInfo], architecture: Architecture, config: ModelConfig
) -> tuple[dict[str, TensorInfo], dict[str, list[str]]]:
    """Each tensor by the name by which it is given: its role's; a tensor of no role keeps its own.

    Returns:
        The tensors, and the given names of what each stored one holds.

    Raises:
        CheckpointError: two are one, or the names are another architecture's.
    """
    result: dict[str, TensorInfo] = {}
    first: dict[str, str] = {}
    given: dict[str, list[str]] = {}
    for old, plain in unwrapped(path, stored, architecture.names).items():
        for each, info in architecture.separate(path, plain, stored[old], config):
            place = architecture.names.find(each)
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
            given.setdefault(old, []).append(name)
    return _with_embedding(result, config), given


def _with_embedding(tensors: dict[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """The embedding of a tied model under its own name, where only the head's was saved.

    safetensors' `save_model` (so do trainers) keeps the first name, by the alphabet, of tensors that share memory.
    """
    head, embedding = Role.HEAD.tensor_name(), Role.EMBEDDING.tensor_name()
    if config.tie_word_embeddings and head in tensors and embedding not in tensors:
        tensors[embedding] = dataclasses.replace(tensors.pop(head), name=embedding)
    return tensors
