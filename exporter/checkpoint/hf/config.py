"""A Hugging Face folder's config.json -> ModelConfig, by the reader of its architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.architectures import ARCHITECTURES, Architecture
from qwen_aot.exporter.checkpoint.text_files import read_text
from qwen_aot.exporter.model.config import ModelConfig


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is unreadable, a Git LFS pointer, not UTF-8 JSON, or not an object.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # not JSON, or a number of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({error}); download or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; accepted: an object")
    return content


def read_folder(folder: Path) -> tuple[ModelConfig, Architecture]:
    """The config of a checkpoint's folder, stop ids of its generation_config.json included, and its architecture.

    Raises:
        CheckpointError: there is no config.json, or it is not supported.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; accepted: a folder saved by transformers")
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    raw = read_json(folder / "config.json")
    try:
        return parse(raw, generation), architecture_of(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def architecture_of(raw: Mapping[str, Any]) -> Architecture:
    """The row of ARCHITECTURES that a parsed config.json names.

    Raises:
        CheckpointError: there is none.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise CheckpointError(f"model_type is {model_type!r}; accepted: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def parse(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Reads a Hugging Face `config.json` of any architecture in ARCHITECTURES.

    Args:
        raw: the parsed config.json.
        generation: the parsed generation_config.json.

    Raises:
        CheckpointError: a key is missing, or a value is not supported (named).
    """
    return architecture_of(raw).parse(raw, generation or {})
