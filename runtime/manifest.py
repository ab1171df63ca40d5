"""The bundle format: manifest.json's types and its strict JSON form (standard library only).

`runtime.bundle` checks the files that a manifest lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from qwen_aot_errors import BundleError
from runtime._strict_json import parse_dataclass, parse_object

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "FileEntry",
    "IoTensor",
    "Manifest",
    "ModelFacts",
    "Profile",
]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

DTYPES = ("int64", "int32", "float32", "float16", "bfloat16", "int8")
DIMENSIONS = ("B", "S", "C", "W")

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class IoTensor:
    """One engine input or output. A dimension is a size or a letter (B, S, C, W)."""

    name: str
    dtype: str  # one of DTYPES
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BundleError(f"I/O tensor {self.name!r} has dtype {self.dtype!r}; accepted: {', '.join(DTYPES)}")
        for dim in self.shape:
            if dim not in DIMENSIONS and not (isinstance(dim, int) and dim > 0):
                raise BundleError(
                    f"I/O tensor {self.name!r} has dimension {dim!r}; accepted: a positive size or one of "
                    f"{', '.join(DIMENSIONS)}"
                )


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle, by its name relative to the bundle's folder."""

    bytes: int
    sha256: str  # 64 lower-case hex digits

    def __post_init__(self) -> None:
        if self.bytes < 0 or not _SHA256.fullmatch(self.sha256):
            raise BundleError(
                f"file entry has bytes {self.bytes} and sha256 {self.sha256!r}; accepted: a size of at least 0 and 64 "
                "lower-case hex digits"
            )


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

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "num_parameters",
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """Allowed new tokens per row and step (S)."""

    name: str  # prefill | decode
    min_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise BundleError(
                f"profile {self.name!r} allows {self.min_tokens} to {self.max_tokens} tokens; "
                f"accepted: 1 <= min_tokens <= max_tokens"
            )


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

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise BundleError(_version_message(self.format_version))
        _require_positive(self, "max_context", "max_batch", "prefill_chunk")
        for name in self.files:
            _check_file_name(name)
        if self.engine not in self.files:
            raise BundleError(
                f"the engine file {self.engine!r} is not among the bundle's files ({', '.join(self.files)})"
            )
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                raise BundleError(f"an {kind} is listed twice among {', '.join(names)}")

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and checks manifest.json.

        Raises:
            BundleError: not JSON, a duplicate, unknown or missing key, a value of the wrong type or out of
                range, a file name that leaves the bundle, or another format version.
        """
        document = parse_object(text, MANIFEST_NAME)
        # Before anything else: another version may have other keys.
        version = document.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise BundleError(_version_message(version))
        return parse_dataclass(cls, document, MANIFEST_NAME)


def _require_positive(instance: Any, *names: str) -> None:
    for name in names:
        value = getattr(instance, name)
        if value < 1:
            raise BundleError(f"{name} is {value}; accepted: at least 1")


def _version_message(found: object) -> str:
    return (
        f"{MANIFEST_NAME} has format_version {found!r}, this runtime reads {FORMAT_VERSION}: "
        f"rebuild the bundle with this version of qwen-aot, or run it with the one that built it"
    )


def _check_file_name(name: str) -> None:
    """A file name may name a file in the bundle's folder or below, on every operating system."""
    path = PurePosixPath(name)
    is_safe = (
        name not in ("", MANIFEST_NAME)
        and path.as_posix() == name  # no "./x", "a//b", "a/"
        and not path.is_absolute()
        and ".." not in path.parts
        and not re.search(r'[\\:\x00-\x1f<>"|?*]', name)  # drive letters, other separators, control characters
    )
    if not is_safe:
        raise BundleError(
            f"{MANIFEST_NAME} lists a file named {name!r}; accepted: a relative path with '/' inside the "
            f"bundle's folder. Don't use this bundle unless you know where it comes from"
        )
