"""Format version 1, read as version 2: the only place that knows it. `docs/bundle.md` has the same as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_aot.runtime.bundle.files import MANIFEST_NAME
from qwen_aot.runtime.bundle.strict_json import require_keys

__all__ = ["upgraded"]

_KEPT = ("model", "target", "max_context", "max_batch", "prefill_chunk", "tool_versions", "files")
# Version 1 had one engine, the text engine, and its facts beside those of the bundle.
_OF_THE_ENGINE = {
    "engine": "file",
    "precision": "precision",
    "quantization": "quantization",
    "inputs": "inputs",
    "outputs": "outputs",
    "tensorrt": "tensorrt",
    "profiles": "profiles",
    "cache_dtype": "cache_dtype",
}


def upgraded(document: Mapping[str, Any]) -> dict[str, Any]:
    """The version 2 document that says the same; only the top level's keys are checked here.

    Raises:
        BundleError: a key is missing or unknown.
    """
    require_keys(document, ("format_version", *_KEPT, *_OF_THE_ENGINE), f"{MANIFEST_NAME} (format version 1)")
    files = document["files"]
    has_tokenizer = isinstance(files, Mapping) and "tokenizer.json" in files
    text_engine = {new: document[old] for old, new in _OF_THE_ENGINE.items()}
    text_engine |= {
        "weight_encodings": {"kept": {}, "requantized": {}},
        "weight_hashes": None,
        "plan": None,
        "logits_rows": None,
    }
    return {
        "format_version": 2,
        **{key: document[key] for key in _KEPT},
        "engines": {"text": text_engine, "vision": None},
        "text": {
            "tokenizer": "tokenizer.json" if has_tokenizer else None,
            "compiled_tokenizer": None,
            "compiled_chat_template": None,
        },
        "default_max_new_tokens": None,
    }
