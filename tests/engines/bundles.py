"""Small bundles for tests: a manifest without a model behind it, and a check independent of the writer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from qwen_aot.runtime.bundle.manifest import (
    FORMAT_VERSION,
    Engines,
    FileEntry,
    IoTensor,
    Manifest,
    ModelFacts,
    Profile,
    TextEngine,
    TextFiles,
    WeightEncodings,
)


def manifest_for(files: Mapping[str, FileEntry]) -> Manifest:
    """A manifest of a model that doesn't exist."""
    return Manifest(
        format_version=FORMAT_VERSION,
        model=ModelFacts(
            name="tiny",
            model_type="qwen2",
            num_parameters=10,
            vocab_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_ids=(1,),
            pad_token_id=None,
            source={"format": "test"},
        ),
        target="cpu",
        engines=Engines(
            text=TextEngine(
                file="model.onnx",
                precision="fp32",
                quantization={},
                weight_encodings=WeightEncodings(kept={}, requantized={}),
                weight_hashes=None,
                inputs=(IoTensor("input_ids", "int64", ("B", "S")),),
                outputs=(IoTensor("logits", "float32", ("B", 32)),),
                tensorrt=None,
                plan=None,
                profiles=(Profile("prefill", 1, 8), Profile("decode", 1, 1)),
                cache_dtype="float32",
                logits_rows=None,
            ),
            vision=None,
        ),
        max_context=64,
        max_batch=1,
        prefill_chunk=8,
        text=TextFiles(tokenizer=None, compiled_tokenizer=None, compiled_chat_template=None),
        default_max_new_tokens=None,
        tool_versions={"python": "3.11"},
        files=files,
    )


def assert_whole(bundle: Path) -> str:
    """Checks every file against the manifest, and that nothing else is there. Returns the engine's text."""
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    assert {path.name for path in bundle.iterdir()} == {*files, "manifest.json"}
    for name, entry in files.items():
        content = (bundle / name).read_bytes()
        assert len(content) == entry["bytes"]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    return (bundle / "model.onnx").read_text()
