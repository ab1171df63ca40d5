"""The bundle format: manifest.json's types, how a bundle is loaded and checked (standard library only)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class IoTensor:
    """One engine input or output. A dimension is a size or a letter (B, S, C, W)."""

    name: str
    dtype: str  # int64 | int32 | float32 | float16 | bfloat16 | int8
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle, by its name relative to the bundle's folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the runtime and `inspect` need to know about the model."""

    name: str  # variant name, or the checkpoint's base name
    model_type: str
    num_parameters: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    source: Mapping[str, str]  # Checkpoint.source


@dataclass(frozen=True, slots=True)
class Profile:
    """Allowed new tokens per row and step (S)."""

    name: str  # prefill | decode
    min_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a reader of a bundle needs; nothing is re-derived from the graph."""

    format_version: int
    model: ModelFacts
    target: str
    precision: str
    quantization: Mapping[str, int | str | bool]  # block_size, symmetric, ... ; empty for fp32
    engine: str  # file name: model.onnx
    max_context: int  # tokens
    max_batch: int  # rows
    prefill_chunk: int  # tokens
    cache_dtype: str
    inputs: tuple[IoTensor, ...]
    outputs: tuple[IoTensor, ...]
    profiles: tuple[Profile, ...]
    tool_versions: Mapping[str, str]
    files: Mapping[str, FileEntry]

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
