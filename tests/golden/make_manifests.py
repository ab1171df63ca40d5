"""Remakes manifests.json: `python -m tests.golden.make_manifests`.

Manifests that every reader of a bundle must take, and those that it must refuse. Written from the format's
rules alone; no code of ours is asked. A case is the text of a manifest.json and whether it is accepted; of format
version 1, the document of version 2 that a reader must take it for (`upgraded`).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

SHA256 = "0123456789abcdef" * 4
MODEL: dict[str, Any] = {
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
}
QUANTIZATION = {"block_size": 32, "symmetric": True, "method": "rtn"}
INPUTS: list[dict[str, Any]] = [
    {"name": "input_ids", "dtype": "int64", "shape": ["B", "S"]},
    {"name": "past_key_values.0.key", "dtype": "float16", "shape": ["B", 16, "C", 64]},
]
LOGITS = {"name": "logits", "dtype": "float32", "shape": ["B", 151936]}
PROFILES = [{"name": "prefill", "min_tokens": 1, "max_tokens": 512}]
FILE = {"bytes": 10, "sha256": SHA256}
BASE: dict[str, Any] = {
    "format_version": 2,
    "model": MODEL,
    "target": "cpu",
    "engines": {
        "text": {
            "file": "model.onnx",
            "precision": "int4",
            "quantization": QUANTIZATION,
            "weight_encodings": {"kept": {}, "requantized": {}},
            "weight_hashes": None,
            "inputs": INPUTS,
            "outputs": [LOGITS],
            "tensorrt": None,
            "plan": None,
            "profiles": PROFILES,
            "cache_dtype": "float16",
            "logits_rows": None,
        },
        "vision": None,
    },
    "max_context": 32768,
    "max_batch": 1,
    "prefill_chunk": 512,
    "text": {"tokenizer": None, "compiled_tokenizer": None, "compiled_chat_template": None},
    "default_max_new_tokens": None,
    "tool_versions": {"onnx": "1.23.2"},
    "files": {"model.onnx": FILE},
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
    "onnx": {"model.onnx": FILE},
    "plugins": None,
}
PLUGINS = {"file": "model.onnx", "sha256": SHA256, "in_engine": False, "ops": ["QwenGQA"]}
PRODUCT = {"name": "layers.*.qkv", "left": "int8", "right": "int8", "output": "float16", "count": 1}
COPY = {"name": "present.*.key", "op": "Slice", "bytes": 8388608, "count": 1}
STEP: dict[str, Any] = {
    "kernels": 14,
    "layer_kernels": [12],
    "matrix_products": [PRODUCT],
    "copies": [COPY],
    "weight_scratch": [],
}
VISION: dict[str, Any] = {
    "file": "model.onnx",
    "precision": "fp16",
    "quantization": {},
    "weight_encodings": {"kept": {}, "requantized": {}},
    "weight_hashes": None,
    "inputs": [{"name": "pixel_values", "dtype": "float16", "shape": ["B", 3, 448, 448]}],
    "outputs": [{"name": "image_embeddings", "dtype": "float16", "shape": ["B", 256, 4096]}],
    "tensorrt": None,
    "plan": None,
    "max_batch": 4,
}
KERNELS = {"file": "model.onnx", "version": 1, "cache_dtype": "float16"}
LAST_LOGITS = {"name": "last_logits", "dtype": "float32", "shape": ["B", "T", 151936]}
POSITIONS = {"name": "logits_positions", "dtype": "int64", "shape": ["T"]}
ROTARY = {"dtype": "int64", "shape": ["B"]}
REMOVED = object()

KeyPath = list[str | int]
TEXT: KeyPath = ["engines", "text"]
VISION_KEY: KeyPath = ["engines", "vision"]


def speculative(
    rows: Any, last_logits: list[dict[str, Any]], positions: tuple[dict[str, Any], ...] = (POSITIONS,)
) -> dict[str, Any]:
    """The base's text engine with these rows of logits, and these outputs and inputs more."""
    text = BASE["engines"]["text"]
    return text | {
        "logits_rows": rows,
        "inputs": [*text["inputs"], *positions],
        "outputs": [LOGITS, *last_logits],
    }


# (what, path, value, accepted)
EDITS: list[tuple[str, KeyPath, Any, bool]] = [
    ("as it is", ["format_version"], 2, True),
    ("a file in a folder", ["files", "weights/part.bin"], {"bytes": 0, "sha256": SHA256}, True),
    ("a bos token", ["model", "bos_token_id"], 1, True),
    ("the largest context", ["max_context"], 2**31 - 1, True),
    ("a context beyond 31 bits", ["max_context"], 2**31, False),
    ("as many parameters as 63 bits count", ["model", "num_parameters"], 2**63 - 1, True),
    ("an integer beyond 64 bits", ["model", "num_parameters"], 2**64, False),
    ("half of a character", ["target"], "\ud83d", False),
    ("half of a character in a key", ["tool_versions", "\ude00"], "1", False),
    ("a character of two halves", ["target"], "\U0001f600", True),
    ("a later version", ["format_version"], 3, False),
    ("version 0", ["format_version"], 0, False),
    ("a version that is text", ["format_version"], "2", False),
    ("a version with a fraction", ["format_version"], 2.0, False),
    ("a version that is true", ["format_version"], True, False),
    ("no version", ["format_version"], REMOVED, False),
    ("the keys of version 2 under the number of version 1", ["format_version"], 1, False),
    ("an unknown key", ["extra"], 1, False),
    ("an unknown key inside", ["model", "extra"], 1, False),
    ("a key of version 1", ["engine"], "model.onnx", False),
    ("a missing key", ["target"], REMOVED, False),
    ("a missing key inside", ["files", "model.onnx", "sha256"], REMOVED, False),
    ("a number that is text", ["max_batch"], "1", False),
    ("a number with a fraction", ["max_context"], 32768.0, False),
    ("true for a number", ["prefill_chunk"], True, False),
    ("null for a number", ["model", "vocab_size"], None, False),
    ("nothing of what must be", ["max_batch"], 0, False),
    ("a size below 0", ["files", "model.onnx", "bytes"], -1, False),
    ("a hash in capitals", ["files", "model.onnx", "sha256"], SHA256.upper(), False),
    ("a short hash", ["files", "model.onnx", "sha256"], SHA256[1:], False),
    # Engines.
    ("no engines", ["engines"], {}, False),
    ("no text engine", TEXT, None, False),
    ("an engine of another kind", ["engines", "audio"], None, False),
    ("an unknown key of the engine", [*TEXT, "extra"], None, False),
    ("an engine that isn't a file", [*TEXT, "file"], "engine.plan", False),
    ("no quantization", [*TEXT, "quantization"], {}, True),
    ("null inside quantization", [*TEXT, "quantization", "x"], None, False),
    ("a fixed capacity", [*TEXT, "inputs", 1, "shape", 2], 33280, True),
    ("a fixed capacity without room for a prefill step", [*TEXT, "inputs", 1, "shape", 2], 33279, False),
    ("a cache of lengths", [*TEXT, "inputs", 1, "dtype"], "int64", False),
    ("another dtype than the cache's", [*TEXT, "inputs", 1, "dtype"], "int8", False),
    ("a cache of two dimensions", [*TEXT, "inputs", 1, "shape"], ["B", "C"], False),
    ("a cache whose heads are a letter", [*TEXT, "inputs", 1, "shape", 1], "S", False),
    ("a cache without rows", [*TEXT, "inputs", 1, "shape", 0], 1, False),
    ("an input of image rows", [*TEXT, "inputs", 0, "shape"], ["I", 1024], True),
    ("several rotary tables", [*TEXT, "inputs", 0], ROTARY | {"name": "rotary_offset.8192"}, True),
    ("rotary tables of the most tokens", [*TEXT, "inputs", 0], ROTARY | {"name": "rotary_offset.999999999"}, True),
    ("rotary tables of no number", [*TEXT, "inputs", 0], ROTARY | {"name": "rotary_offset."}, False),
    ("rotary tables of no tokens", [*TEXT, "inputs", 0], ROTARY | {"name": "rotary_offset.0"}, False),
    ("rotary tables of a number with a 0 first", [*TEXT, "inputs", 0], ROTARY | {"name": "rotary_offset.08"}, False),
    ("rotary tables of more tokens", [*TEXT, "inputs", 0], ROTARY | {"name": "rotary_offset.1000000000"}, False),
    ("rotary tables of a text", [*TEXT, "inputs", 0], ROTARY | {"name": "rotary_offset.8k"}, False),
    ("an unknown dtype", [*TEXT, "inputs", 0, "dtype"], "int4", False),
    ("an unknown dimension", [*TEXT, "inputs", 0, "shape", 0], "X", False),
    ("a dimension of 0", [*TEXT, "outputs", 0, "shape", 1], 0, False),
    ("a dimension beyond 31 bits", [*TEXT, "outputs", 0, "shape", 1], 2**31, False),
    ("an input twice", [*TEXT, "inputs", 1], INPUTS[0], False),
    ("a profile upside down", [*TEXT, "profiles", 0, "min_tokens"], 513, False),
    ("a profile beyond 31 bits", [*TEXT, "profiles", 0, "max_tokens"], 2**31, False),
    ("a profile twice", [*TEXT, "profiles"], [{"name": "prefill", "min_tokens": 1, "max_tokens": 512}] * 2, False),
    ("the last token as an end", ["model", "eos_token_ids"], [151935], True),
    ("an end beyond the vocabulary", ["model", "eos_token_ids"], [151643, 151936], False),
    ("a bos token below 0", ["model", "bos_token_id"], -1, False),
    ("a pad token beyond the vocabulary", ["model", "pad_token_id"], 151936, False),
    ("layers below 0", [*TEXT, "tensorrt"], TENSORRT | {"layers": {"SLICE": -3}}, False),
    ("an ONNX outside the folder", [*TEXT, "tensorrt"], TENSORRT | {"onnx": {"../model.onnx": FILE}}, False),
    # Encodings of weights.
    ("encodings", [*TEXT, "weight_encodings"], {"kept": {"gguf-q8_0": 168}, "requantized": {"gptq": 1}}, True),
    ("an encoding of nothing", [*TEXT, "weight_encodings", "kept"], {"gguf-q8_0": 0}, False),
    ("encodings of more tensors than 31 bits count", [*TEXT, "weight_encodings", "kept"], {"gptq": 2**31}, False),
    ("an encoding that isn't counted", [*TEXT, "weight_encodings", "requantized"], {"gptq": "1"}, False),
    ("encodings without those requantized", [*TEXT, "weight_encodings", "requantized"], REMOVED, False),
    ("no encodings", [*TEXT, "weight_encodings"], None, False),
    # Hashes of weights.
    ("hashes of weights", [*TEXT, "weight_hashes"], {"lm_head.weight": SHA256}, True),
    ("no weights to hash", [*TEXT, "weight_hashes"], {}, True),
    ("a weight's hash in capitals", [*TEXT, "weight_hashes"], {"lm_head.weight": SHA256.upper()}, False),
    ("a weight's hash with a digit more", [*TEXT, "weight_hashes"], {"lm_head.weight": SHA256 + "0"}, False),
    ("a weight without its hash", [*TEXT, "weight_hashes"], {"lm_head.weight": None}, False),
    ("a list of hashes", [*TEXT, "weight_hashes"], [SHA256], False),
    ("no key for the hashes of weights", [*TEXT, "weight_hashes"], REMOVED, False),
    # Rows of logits.
    ("the logits of eight tokens", TEXT, speculative(8, [LAST_LOGITS]), True),
    ("no logits of the last tokens under a number of rows", TEXT, speculative(8, []), False),
    ("the logits of the last tokens without a number of rows", TEXT, speculative(None, [LAST_LOGITS]), False),
    ("only the input of these logits, without a number of rows", TEXT, speculative(None, []), False),
    ("only the output, without a number of rows", TEXT, speculative(None, [LAST_LOGITS], ()), False),
    ("the logits of the last tokens without their input", TEXT, speculative(8, [LAST_LOGITS], ()), False),
    ("the logits of as many tokens as a prefill chunk", TEXT, speculative(512, [LAST_LOGITS]), True),
    ("the logits of more tokens than a prefill chunk", TEXT, speculative(513, [LAST_LOGITS]), False),
    ("the logits of one token", TEXT, speculative(1, [LAST_LOGITS]), False),
    ("no row of logits", TEXT, speculative(0, [LAST_LOGITS]), False),
    ("logits of the last tokens of another type", TEXT, speculative(8, [LAST_LOGITS | {"dtype": "float16"}]), False),
    ("a number of last tokens", TEXT, speculative(8, [LAST_LOGITS | {"shape": ["B", 8, 151936]}]), False),
    ("last tokens by another letter", TEXT, speculative(8, [LAST_LOGITS | {"shape": ["B", "S", 151936]}]), False),
    ("last tokens of another vocabulary", TEXT, speculative(8, [LAST_LOGITS | {"shape": ["B", "T", 7]}]), False),
    ("positions of another type", TEXT, speculative(8, [LAST_LOGITS], (POSITIONS | {"dtype": "int32"},)), False),
    ("positions of another shape", TEXT, speculative(8, [LAST_LOGITS], (POSITIONS | {"shape": ["B"]},)), False),
    ("no key for the rows of logits", [*TEXT, "logits_rows"], REMOVED, False),
    # The graph for own kernels: the one key that may be absent, as it is in the base.
    ("a graph for own kernels", [*TEXT, "kernels"], KERNELS, True),
    (
        "a graph for own kernels with a cache of another type",
        [*TEXT, "kernels"],
        KERNELS | {"cache_dtype": "int8"},
        True,
    ),
    ("no graph for own kernels", [*TEXT, "kernels"], None, True),
    ("a graph for own kernels that isn't a file", [*TEXT, "kernels"], KERNELS | {"file": "model.kernels.onnx"}, False),
    ("a graph for kernels of version 0", [*TEXT, "kernels"], KERNELS | {"version": 0}, False),
    ("a graph for kernels of a version that is text", [*TEXT, "kernels"], KERNELS | {"version": "1"}, False),
    ("a graph for kernels with a cache of lengths", [*TEXT, "kernels"], KERNELS | {"cache_dtype": "int64"}, False),
    ("a graph for own kernels with a key too many", [*TEXT, "kernels"], KERNELS | {"library": "x.so"}, False),
    ("a graph for own kernels without a version", [*TEXT, "kernels"], {"file": "model.onnx"}, False),
    ("the name of a graph for own kernels", [*TEXT, "kernels"], "model.onnx", False),
    ("kernels of the vision engine", VISION_KEY, VISION | {"kernels": None}, False),
    # Plans.
    ("a plan", [*TEXT, "plan"], {"prefill": STEP}, True),
    ("a plan of nothing", [*TEXT, "plan"], {}, True),
    ("a plan that counts no layer", [*TEXT, "plan"], {"prefill": STEP | {"layer_kernels": []}}, True),
    ("a plan of no kernel", [*TEXT, "plan"], {"prefill": STEP | {"kernels": 0, "layer_kernels": [0]}}, True),
    ("a plan of a step without a profile", [*TEXT, "plan"], {"decode": STEP}, False),
    ("a plan that is a list", [*TEXT, "plan"], [STEP], False),
    ("no key for the plan", [*TEXT, "plan"], REMOVED, False),
    ("a plan of two layers, of a model of one", [*TEXT, "plan"], {"prefill": STEP | {"layer_kernels": [6, 6]}}, False),
    ("more kernels in layers than in all", [*TEXT, "plan"], {"prefill": STEP | {"layer_kernels": [15]}}, False),
    ("fewer kernels than none", [*TEXT, "plan"], {"prefill": STEP | {"layer_kernels": [-1]}}, False),
    ("a plan with a key too many", [*TEXT, "plan"], {"prefill": STEP | {"seconds": 1}}, False),
    (
        "a product of an unknown type",
        [*TEXT, "plan"],
        {"prefill": STEP | {"matrix_products": [PRODUCT | {"left": "half"}]}},
        False,
    ),
    (
        "a product that isn't there",
        [*TEXT, "plan"],
        {"prefill": STEP | {"matrix_products": [PRODUCT | {"count": 0}]}},
        False,
    ),
    ("a copy of unknown size", [*TEXT, "plan"], {"prefill": STEP | {"copies": [COPY | {"bytes": None}]}}, True),
    ("a copy of negative size", [*TEXT, "plan"], {"prefill": STEP | {"copies": [COPY | {"bytes": -1}]}}, False),
    ("scratch for a weight", [*TEXT, "plan"], {"prefill": STEP | {"weight_scratch": [COPY]}}, True),
    # A vision engine.
    ("a vision engine", VISION_KEY, VISION, True),
    ("a vision engine with TensorRT's facts", VISION_KEY, VISION | {"tensorrt": TENSORRT}, True),
    (
        "a vision engine with a plan",
        VISION_KEY,
        VISION | {"plan": {"encode": STEP | {"layer_kernels": [6, 6]}}},
        True,
    ),
    ("no key for the vision engine", VISION_KEY, REMOVED, False),
    ("a vision engine that isn't a file", VISION_KEY, VISION | {"file": "vision.onnx"}, False),
    ("a vision engine of any size", [*VISION_KEY], VISION | {"outputs": INPUTS[:1]}, False),
    (
        "a vision engine of one image",
        VISION_KEY,
        VISION | {"outputs": [{"name": "image_embeddings", "dtype": "float16", "shape": [1, 256, 4096]}]},
        False,
    ),
    ("a vision engine for no image", VISION_KEY, VISION | {"max_batch": 0}, False),
    ("a vision engine with the plan of a prefill", VISION_KEY, VISION | {"plan": {"prefill": STEP}}, False),
    ("a vision engine with profiles", VISION_KEY, VISION | {"profiles": PROFILES}, False),
    (
        "a vision engine whose plugins aren't a file",
        VISION_KEY,
        VISION | {"tensorrt": TENSORRT | {"plugins": PLUGINS | {"file": "x.so"}}},
        False,
    ),
    # Text.
    *(
        case
        for key in ("tokenizer", "compiled_tokenizer", "compiled_chat_template")
        for case in (
            (f"a {key}", ["text", key], "model.onnx", True),
            (f"a {key} that isn't a file", ["text", key], "other", False),
            (f"no key for the {key}", ["text", key], REMOVED, False),
        )
    ),
    ("no text files", ["text"], None, False),
    # The default length.
    ("a default length", ["default_max_new_tokens"], 2048, True),
    ("a default length of 0", ["default_max_new_tokens"], 0, False),
    ("a default length beyond 31 bits", ["default_max_new_tokens"], 2**31, False),
    ("no key for the default length", ["default_max_new_tokens"], REMOVED, False),
    # TensorRT.
    ("facts of TensorRT", [*TEXT, "tensorrt"], TENSORRT, True),
    ("facts of TensorRT for the GPU that built it", [*TEXT, "tensorrt"], TENSORRT | {"compute_capabilities": []}, True),
    ("facts of TensorRT with a key too many", [*TEXT, "tensorrt"], TENSORRT | {"sm": "8.9"}, False),
    ("a compute capability without a dot", [*TEXT, "tensorrt"], TENSORRT | {"compute_capabilities": ["89"]}, False),
    ("plugins of TensorRT", [*TEXT, "tensorrt"], TENSORRT | {"plugins": PLUGINS}, True),
    (
        "a plugin library of another hash",
        [*TEXT, "tensorrt"],
        TENSORRT | {"plugins": PLUGINS | {"sha256": "0" * 64}},
        False,
    ),
    (
        "a plugin library that isn't a file",
        [*TEXT, "tensorrt"],
        TENSORRT | {"plugins": PLUGINS | {"file": "x.so"}},
        False,
    ),
    (
        "plugins without a hash",
        [*TEXT, "tensorrt"],
        TENSORRT | {"plugins": {"file": "model.onnx", "in_engine": False, "ops": []}},
        False,
    ),
    ("a builder that told nothing", [*TEXT, "tensorrt"], TENSORRT | {"builder_activation_bytes": None}, True),
    ("negative activations", [*TEXT, "tensorrt"], TENSORRT | {"builder_activation_bytes": -1}, False),
    ("activations that are text", [*TEXT, "tensorrt"], TENSORRT | {"builder_activation_bytes": "1"}, False),
    ("an ONNX without a hash", [*TEXT, "tensorrt"], TENSORRT | {"onnx": {"model.onnx": {"bytes": 1}}}, False),
    ("negative weights", [*TEXT, "tensorrt"], TENSORRT | {"weight_bytes": -1}, False),
    ("a list in the place of facts", [*TEXT, "tensorrt"], [], False),
]
EDITS += [
    (f"the file name {name!r}", ["files", name], {"bytes": 0, "sha256": SHA256}, False)
    for name in (
        "",
        ".",
        "..",
        "a/.",
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


# Version 1: one engine, whose facts stand beside the bundle's.
VERSION_1: dict[str, Any] = {
    "format_version": 1,
    "model": MODEL,
    "target": "cpu",
    "precision": "int4",
    "quantization": QUANTIZATION,
    "engine": "model.onnx",
    "max_context": 32768,
    "max_batch": 1,
    "prefill_chunk": 512,
    "cache_dtype": "float16",
    "inputs": INPUTS,
    "outputs": [LOGITS],
    "profiles": PROFILES,
    "tensorrt": None,
    "tool_versions": {"onnx": "1.23.2"},
    "files": {"model.onnx": FILE},
}

# (what, path in version 1, value, the changes to the base that say the same, each a path and a value; None: refused)
EDITS_1: list[tuple[str, KeyPath, Any, list[tuple[KeyPath, Any]] | None]] = [
    ("as it is", ["format_version"], 1, []),
    ("the model", ["model", "num_hidden_layers"], 2, [(["model", "num_hidden_layers"], 2)]),
    ("the target", ["target"], "cuda", [(["target"], "cuda")]),
    ("the precision", ["precision"], "int8", [([*TEXT, "precision"], "int8")]),
    ("the quantization", ["quantization"], {}, [([*TEXT, "quantization"], {})]),
    ("the context", ["max_context"], 100, [(["max_context"], 100)]),
    ("the batch", ["max_batch"], 4, [(["max_batch"], 4)]),
    ("the prefill chunk", ["prefill_chunk"], 64, [(["prefill_chunk"], 64)]),
    ("an output", ["outputs", 0, "dtype"], "float16", [([*TEXT, "outputs", 0, "dtype"], "float16")]),
    ("an input", ["inputs", 0, "shape"], ["B", 1], [([*TEXT, "inputs", 0, "shape"], ["B", 1])]),
    ("the profiles", ["profiles"], [], [([*TEXT, "profiles"], [])]),
    ("TensorRT's facts", ["tensorrt"], TENSORRT, [([*TEXT, "tensorrt"], TENSORRT)]),
    ("the tools", ["tool_versions"], {}, [(["tool_versions"], {})]),
    (
        "a tokenizer",
        ["files", "tokenizer.json"],
        FILE,
        [(["files", "tokenizer.json"], FILE), (["text", "tokenizer"], "tokenizer.json")],
    ),
    ("a tokenizer's table", ["files", "tokenizer.qtok"], FILE, [(["files", "tokenizer.qtok"], FILE)]),
    ("a key of version 2", ["engines"], BASE["engines"], None),
    ("an unknown key", ["extra"], 1, None),
    ("a missing key", ["cache_dtype"], REMOVED, None),
    ("no files", ["files"], 1, None),
    ("files that are a list", ["files"], ["tokenizer.json"], None),
    ("an engine that isn't a file", ["engine"], "engine.plan", None),
    ("another dtype than the cache's", ["cache_dtype"], "int8", None),
    ("a context that is text", ["max_context"], "1", None),
]


def edited(document: dict[str, Any], path: KeyPath, value: Any) -> dict[str, Any]:
    """The document with one value changed."""
    document = copy.deepcopy(document)
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    if value is REMOVED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


def version_1_case(what: str, path: KeyPath, value: Any, changes: list[tuple[KeyPath, Any]] | None) -> dict[str, Any]:
    """A case of version 1; one that is accepted says what it is in version 2."""
    case = {"what": f"version 1: {what}", "text": json.dumps(edited(VERSION_1, path, value))}
    if changes is None:
        return case | {"accepted": False}
    upgraded = BASE
    for change in changes:
        upgraded = edited(upgraded, *change)
    return case | {"accepted": True, "upgraded": upgraded}


def main() -> None:
    """Writes manifests.json beside this script."""
    cases = [
        {"what": what, "text": json.dumps(edited(BASE, path, value)), "accepted": accepted}
        for what, path, value, accepted in EDITS
    ]
    with_kernels = edited(BASE, [*TEXT, "kernels"], KERNELS)
    what = "a graph for own CPU kernels of target cuda"
    cases += [{"what": what, "text": json.dumps(edited(with_kernels, ["target"], "cuda")), "accepted": False}]
    cases += [version_1_case(*edit) for edit in EDITS_1]
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
