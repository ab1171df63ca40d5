"""Remakes manifests.json: `python -m tests.golden.make_manifests`.

Manifests that every reader of a bundle must take, and those that it must refuse. Written from the format's
rules alone; no code of ours is asked. A case is the text of a manifest.json and whether it is accepted.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

SHA256 = "0123456789abcdef" * 4
BASE: dict[str, Any] = {
    "format_version": 1,
    "model": {
        "name": "qwen1.5-0.5b",
        "model_type": "qwen2",
        "num_parameters": 463987712,
        "vocab_size": 151936,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_ids": [151643],
        "pad_token_id": 151643,
        "source": {"format": "safetensors"},
    },
    "target": "cpu",
    "precision": "int4",
    "quantization": {"block_size": 32, "symmetric": True, "method": "rtn"},
    "engine": "model.onnx",
    "max_context": 32768,
    "max_batch": 1,
    "prefill_chunk": 512,
    "cache_dtype": "float16",
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "shape": ["B", "S"]},
        {"name": "past_key_values.0.key", "dtype": "float16", "shape": ["B", 16, "C", 64]},
    ],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["B", 151936]}],
    "profiles": [{"name": "prefill", "min_tokens": 1, "max_tokens": 512}],
    "tensorrt": None,
    "tool_versions": {"onnx": "1.23.2"},
    "files": {"model.onnx": {"bytes": 10, "sha256": SHA256}},
}
TENSORRT: dict[str, Any] = {
    "version": "1.7.1.116",
    "compute_capabilities": ["8.6", "12.0"],
    "hardware_compatible": False,
    "version_compatible": False,
    "has_weights": True,
    "layers": {"MATRIX_MULTIPLY": 4},
    "weight_bytes": 100,
    "cache_bytes": 100,
    "activation_bytes_estimated": 0,
    "builder_activation_bytes": 12948480,
    "onnx": {"model.onnx": {"bytes": 10, "sha256": SHA256}},
    "plugins": None,
}
PLUGINS = {"file": "model.onnx", "sha256": SHA256, "in_engine": False, "ops": ["QwenGQA"]}
REMOVED = object()

# (what, path, value, accepted)
EDITS: list[tuple[str, list[str | int], Any, bool]] = [
    ("as it is", ["format_version"], 1, True),
    ("a file in a folder", ["files", "weights/part.bin"], {"bytes": 0, "sha256": SHA256}, True),
    ("no quantization", ["quantization"], {}, True),
    ("a bos token", ["model", "bos_token_id"], 1, True),
    ("facts of TensorRT", ["tensorrt"], TENSORRT, True),
    ("facts of TensorRT for the GPU that built it", ["tensorrt"], TENSORRT | {"compute_capabilities": []}, True),
    ("facts of TensorRT with a key too many", ["tensorrt"], TENSORRT | {"sm": "8.9"}, False),
    ("a compute capability without a dot", ["tensorrt"], TENSORRT | {"compute_capabilities": ["89"]}, False),
    ("plugins of TensorRT", ["tensorrt"], TENSORRT | {"plugins": PLUGINS}, True),
    ("a plugin library of another hash", ["tensorrt"], TENSORRT | {"plugins": PLUGINS | {"sha256": "0" * 64}}, False),
    ("a plugin library that isn't a file", ["tensorrt"], TENSORRT | {"plugins": PLUGINS | {"file": "x.so"}}, False),
    (
        "plugins without a hash",
        ["tensorrt"],
        TENSORRT | {"plugins": {"file": "model.onnx", "in_engine": False, "ops": []}},
        False,
    ),
    ("a builder that told nothing", ["tensorrt"], TENSORRT | {"builder_activation_bytes": None}, True),
    ("negative activations", ["tensorrt"], TENSORRT | {"builder_activation_bytes": -1}, False),
    ("activations that are text", ["tensorrt"], TENSORRT | {"builder_activation_bytes": "1"}, False),
    ("an ONNX without a hash", ["tensorrt"], TENSORRT | {"onnx": {"model.onnx": {"bytes": 1}}}, False),
    ("negative weights", ["tensorrt"], TENSORRT | {"weight_bytes": -1}, False),
    ("a list in the place of facts", ["tensorrt"], [], False),
    ("a fixed capacity", ["inputs", 1, "shape", 2], 33280, True),
    ("a fixed capacity without room for a prefill step", ["inputs", 1, "shape", 2], 33279, False),
    ("a cache of lengths", ["inputs", 1, "dtype"], "int64", False),
    ("another dtype than the cache's", ["inputs", 1, "dtype"], "int8", False),
    ("a cache of two dimensions", ["inputs", 1, "shape"], ["B", "C"], False),
    ("a cache whose heads are a letter", ["inputs", 1, "shape", 1], "S", False),
    ("a cache without rows", ["inputs", 1, "shape", 0], 1, False),
    ("the largest context", ["max_context"], 2**31 - 1, True),
    ("a context beyond 31 bits", ["max_context"], 2**31, False),
    ("a dimension beyond 31 bits", ["outputs", 0, "shape", 1], 2**31, False),
    ("as many parameters as 63 bits count", ["model", "num_parameters"], 2**63 - 1, True),
    ("an integer beyond 64 bits", ["model", "num_parameters"], 2**64, False),
    ("another version", ["format_version"], 2, False),
    ("a version that is text", ["format_version"], "1", False),
    ("a version that is true", ["format_version"], True, False),
    ("no version", ["format_version"], REMOVED, False),
    ("an unknown key", ["extra"], 1, False),
    ("an unknown key inside", ["model", "extra"], 1, False),
    ("a missing key", ["engine"], REMOVED, False),
    ("a missing key inside", ["files", "model.onnx", "sha256"], REMOVED, False),
    ("a number that is text", ["max_batch"], "1", False),
    ("a number with a fraction", ["max_context"], 32768.0, False),
    ("true for a number", ["prefill_chunk"], True, False),
    ("null for a number", ["model", "vocab_size"], None, False),
    ("nothing of what must be", ["max_batch"], 0, False),
    ("null inside quantization", ["quantization", "x"], None, False),
    ("an unknown dtype", ["inputs", 0, "dtype"], "int4", False),
    ("an unknown dimension", ["inputs", 0, "shape", 0], "X", False),
    ("a dimension of 0", ["outputs", 0, "shape", 1], 0, False),
    ("an input twice", ["inputs", 1], BASE["inputs"][0], False),
    ("a profile upside down", ["profiles", 0, "min_tokens"], 513, False),
    ("a size below 0", ["files", "model.onnx", "bytes"], -1, False),
    ("a hash in capitals", ["files", "model.onnx", "sha256"], SHA256.upper(), False),
    ("a short hash", ["files", "model.onnx", "sha256"], SHA256[1:], False),
    ("an engine that isn't a file", ["engine"], "engine.plan", False),
]
EDITS += [
    (f"the file name {name!r}", ["files", name], {"bytes": 0, "sha256": SHA256}, False)
    for name in (
        "",
        "/a",
        "../a",
        "a/../b",
        "a/..",
        "./a",
        "a//b",
        "a/",
        "C:a",
        "a\\b",
        "a\0b",
        "a\ud800b",
        "manifest.json",
    )
]


def edited(path: list[str | int], value: Any) -> dict[str, Any]:
    """The base with one value changed."""
    document = copy.deepcopy(BASE)
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


def main() -> None:
    """Writes manifests.json beside this script."""
    cases = [
        {"what": what, "text": json.dumps(edited(path, value)), "accepted": accepted}
        for what, path, value, accepted in EDITS
    ]
    text = json.dumps(BASE)
    cases += [
        {"what": "cut short", "text": text[:-1], "accepted": False},
        {"what": "a key twice", "text": text[:-1] + ', "target": "cpu"}', "accepted": False},
        {"what": "thousands of digits", "text": text.replace("463987712", "9" * 5000), "accepted": False},
        {"what": "a list", "text": f"[{text}]", "accepted": False},
        {"what": "two documents", "text": text + text, "accepted": False},
        {"what": "NaN", "text": text.replace("32768", "NaN", 1), "accepted": False},
        {"what": "nothing", "text": "", "accepted": False},
    ]
    document = json.dumps({"cases": cases}, indent=1)
    Path(__file__).with_name("manifests.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
