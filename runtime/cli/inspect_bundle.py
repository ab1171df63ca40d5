"""Facts of a bundle for `inspect`: the manifest, and each file's state."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_aot.errors import BundleError
from qwen_aot.runtime.bundle.load import read_manifest
from qwen_aot.runtime.bundle.manifest import CACHE_PREFIX, FileEntry, TensorRtFacts
from qwen_aot.runtime.bundle.places import place_of
from qwen_aot.whole_file import file_sha256


def facts(path: Path, *, with_hash: bool) -> dict[str, Any]:
    """Everything the manifest says and how the files stand to it.

    Raises:
        BundleError: the manifest can't be read.
    """
    manifest = read_manifest(path)
    values = asdict(manifest)
    model, engine = values["model"], values["engines"]["text"]
    cache = [tensor for tensor in engine["inputs"] if tensor["name"].startswith(CACHE_PREFIX)]
    return {
        "kind": "bundle",
        "path": str(path),
        **{key: model[key] for key in ("name", "model_type", "num_parameters", "vocab_size", "num_hidden_layers")},
        "target": manifest.target,
        "precision": engine["precision"],
        "quantization": engine["quantization"],
        "engine": engine["file"],
        **{name: values[name] for name in ("max_context", "max_batch", "prefill_chunk", "default_max_new_tokens")},
        **{name: engine[name] for name in ("cache_dtype", "kernels", "logits_rows", "weight_encodings")},
        "format_version": manifest.format_version,
        **values["text"],
        "total_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "cache_tensors": len(cache),
        **_engine_facts(manifest.engines.text.tensorrt),
        "plan": engine["plan"],
        "vision": values["engines"]["vision"],
        "source": model["source"],
        "tool_versions": values["tool_versions"],
        "io": [
            {"direction": direction, **tensor}
            for direction, tensors in (("in", engine["inputs"]), ("out", engine["outputs"]))
            for tensor in tensors
        ],
        "profiles": engine["profiles"],
        "files": [
            {
                "name": name,
                "bytes": entry.bytes,
                "status": _status(path, name, entry, with_hash),
                "sha256": entry.sha256,
            }
            for name, entry in manifest.files.items()
        ],
    }


def _engine_facts(facts: TensorRtFacts | None) -> dict[str, Any]:
    """What an engine can't be asked without its GPU; nothing of a bundle without one."""
    if facts is None:
        return {}
    engine = asdict(facts)
    layers = engine.pop("layers")
    return {
        **{("tensorrt_version" if name == "version" else name): value for name, value in engine.items()},
        "network_layers": sum(layers.values()),
        "layers": [{"type": kind, "count": count} for kind, count in layers.items()],
    }


def _status(folder: Path, name: str, entry: FileEntry, with_hash: bool) -> str:
    try:
        return _compared(place_of(folder, name).path, entry, with_hash)
    except BundleError:
        return "a link out of the bundle"
    except OSError as error:  # one file that may not be read; the others are shown all the same
        return f"can't be read: {error.strerror or error}"


def _compared(path: Path, entry: FileEntry, with_hash: bool) -> str:
    if not path.is_file():
        return "missing"
    found = path.stat().st_size
    if found != entry.bytes:
        return f"size is {found}"
    if not with_hash:
        return "size ok"
    return "ok" if file_sha256(path) == entry.sha256 else "damaged"
