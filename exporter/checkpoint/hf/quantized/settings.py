"""What a folder says of its quantization: in config.json, and in the files beside it that older tools wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.hf.config import read_json
from qwen_aot.exporter.checkpoint.hf.quantized.config_checks import shown
from qwen_aot.exporter.checkpoint.hf.quantized.formats import FORMATS, Format, Settings

_KEY = "quantization_config"
# Files beside config.json -> whose they are, where they don't say it.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_REFUSED_FILES = {"hf_quant_config.json": "ModelOpt"}
_ACCEPTED = (
    f"accepted: {', '.join(FORMATS)} (docs/quantized-checkpoints.md), or the bfloat16, float16 or float32 checkpoint, "
    "which the build quantizes itself"
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """A folder's format and settings.

    Attributes:
        name: `quant_method`.
        where: the files that say it, for messages.
    """

    name: str
    where: str
    format: Format[Any]
    settings: Settings


def read_quantization(folder: Path) -> Quantization | None:
    """What config.json and the files beside it say, or None: nothing.

    Raises:
        CheckpointError: they say what isn't supported, or different things.
    """
    for name, tool in _REFUSED_FILES.items():
        if (folder / name).is_file():
            raise CheckpointError(
                f"{folder} holds {name}: its weights are quantized by {tool}, which is not supported; {_ACCEPTED} (if "
                f"these are plain weights, move {name} away)"
            )
    said: dict[str, Mapping[str, Any]] = {}
    config = read_json(folder / "config.json").get(_KEY)
    if config is not None:
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder / 'config.json'}: {_KEY} says {shown(config)}; accepted: an object")
        said["config.json"] = config
    for name, method in _FILES.items():
        if (folder / name).is_file():
            said[name] = {"quant_method": method} | read_json(folder / name)
    if not said:
        return None
    where = " and ".join(str(folder / name) for name in said)
    try:
        name = _method(said)
        quantized = FORMATS[name]
        merged = _merged({file: _renamed(raw, quantized.synonyms) for file, raw in said.items()}, quantized)
        return Quantization(name, where, quantized, quantized.parse(merged))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {_KEY}: {error}") from error


def _method(said: Mapping[str, Mapping[str, Any]]) -> str:
    """The one method that every file names; GPTQModel also calls it `method`."""
    names: dict[str, None] = {}
    for raw in said.values():
        found = [raw[key] for key in ("quant_method", "method") if raw.get(key) is not None]
        if not found:
            raise CheckpointError(f"quant_method is missing; {_ACCEPTED}")
        for name in found:
            if not isinstance(name, str) or name.lower() not in FORMATS:
                raise CheckpointError(f"quant_method is {shown(name)}; not supported; {_ACCEPTED}")
            names[name.lower()] = None
    if len(names) > 1:
        raise CheckpointError(f"quant_method is {' and '.join(names)}; accepted: one of them")
    return next(iter(names))


def _renamed(raw: Mapping[str, Any], synonyms: Mapping[str, str]) -> dict[str, Any]:
    renamed = {synonyms.get(key, key): value for key, value in raw.items()}
    if len(renamed) != len(raw):
        twice = next(f"{old} and {new}" for old, new in synonyms.items() if old in raw and new in raw)
        raise CheckpointError(f"{twice} are one key; accepted: one of them")
    return renamed


def _merged(said: Mapping[str, Mapping[str, Any]], quantized: Format[Any]) -> dict[str, Any]:
    """All keys; those that are read have one value, whoever says it."""
    merged: dict[str, Any] = {}
    for file, raw in said.items():
        for key, value in raw.items():
            other = merged.get(key)
            if key in quantized.read and None not in (value, other) and _lower(value) != _lower(other):
                raise CheckpointError(
                    f"{key} is {shown(other)}, and {shown(value)} in {file}; accepted: one value in both"
                )
            if other is None:
                merged[key] = value
    return merged


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value
