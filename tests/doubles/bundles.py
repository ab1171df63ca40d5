"""Bundles for the double of TensorRT: engine.rtx or engine.plan is an ONNX file with profiles in its metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.graph.vision_trace import trace_vision
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.model.tensors import num_parameters
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from qwen_aot.runtime.bundle.manifest import (
    CACHE_PREFIX,
    MANIFEST_NAME,
    FileEntry,
    IoTensor,
    Manifest,
    ModelFacts,
    PluginFacts,
    TensorRtFacts,
    VisionEngine,
    WeightEncodings,
    cache_capacity,
)
from tests.doubles.install import VERSIONS
from tests.doubles.tensorrt import HOST_CODE_KEY, METADATA_KEY, PLUGINS_KEY
from tests.runtime.toys import make_manifest, text_files

ENGINE_FILES = {"tensorrt_rtx": "engine.rtx", "tensorrt": "engine.plan"}
TARGETS = {"tensorrt_rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
ACTIVATION_BYTES = 4096
WEIGHT_BYTES = 1 << 20
ITEM_BYTES = {"int64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
PLUGIN_LIBRARY, PLUGIN_CONTENT = "libqwen_aot_plugins.so", "what plugins are"


def facts_for(flavour: str, manifest: Manifest, **overrides: Any) -> TensorRtFacts:
    """What a build for SM 8.9 would have written down."""
    cache = [tensor for tensor in manifest.engines.text.inputs if tensor.name.startswith(CACHE_PREFIX)]
    facts = TensorRtFacts(
        version=VERSIONS[flavour],
        compute_capabilities=("8.6", "8.9"),
        hardware_compatible=False,
        version_compatible=False,
        has_weights=True,
        layers={"MATRIX_MULTIPLY": 1},
        weight_bytes=WEIGHT_BYTES,
        cache_bytes=sum(
            manifest.max_batch * math.prod(int(size) for size in tensor.shape[1:]) * ITEM_BYTES[tensor.dtype]
            for tensor in cache
        ),
        activation_bytes_estimated=ACTIVATION_BYTES,
        builder_activation_bytes=None,
        onnx={"model.onnx": FileEntry(1, "0" * 64)},
        plugins=None,
    )
    return replace(facts, **overrides)


def write_tensorrt_bundle(
    folder: Path,
    model: onnx.ModelProto,
    manifest: Manifest,
    flavour: str,
    *,
    texts: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    decode_tokens: int = 1,
    plugins: bool = False,
    host_code: str | None = None,
) -> Path:
    """Writes a bundle whose engine the double can load; returns its folder.

    Args:
        folder: is made.
        model: with its weights inside and a cache of fixed capacity.
        manifest: everything but engine, target, `tensorrt` and files is kept.
        flavour: tensorrt_rtx or tensorrt.
        texts: further files.
        facts: what differs from `facts_for`.
        plugins: the engine has plugin layers, and the bundle their library.
        host_code: what code for the host the engine carries: the plugin library's content, or nothing but its runtime.
        decode_tokens: the largest S of the engine's decode profile, which may be more than is ever asked for.
    """
    folder.mkdir(parents=True)
    capacity = next(int(t.shape[2]) for t in manifest.engines.text.inputs if t.name.startswith(CACHE_PREFIX))
    window, rows, logits_rows = (1, capacity), (1, manifest.max_batch), manifest.engines.text.logits_rows
    ranges = {
        "prefill": {"B": (1, 1), "S": (1, manifest.prefill_chunk), "W": window, "T": (1, 1)},
        "decode": {"B": rows, "S": (1, decode_tokens), "W": window, "T": (1, 1), "I": (1, 1)},
        "verify": {"B": rows, "S": (2, logits_rows or 2), "W": window, "T": (2, logits_rows or 2), "I": (1, 1)},
    }
    ranges["prefill"]["I"] = ranges["prefill"]["S"]
    profiles = [
        {t.name: [_sizes(t, ranges[p.name], end) for end in (0, 1, 1)] for t in manifest.engines.text.inputs}
        for p in manifest.engines.text.profiles
    ]
    metadata = {"profiles": profiles, "weight_bytes": WEIGHT_BYTES, "activation_bytes": ACTIVATION_BYTES}
    properties = {METADATA_KEY: json.dumps(metadata)}
    if plugins:
        properties[PLUGINS_KEY] = PLUGIN_CONTENT
        texts = {**(texts or {}), PLUGIN_LIBRARY: PLUGIN_CONTENT}
        digest = hashlib.sha256(PLUGIN_CONTENT.encode()).hexdigest()
        facts = {"plugins": PluginFacts(PLUGIN_LIBRARY, digest, in_engine=False, ops=("QwenGQA",)), **(facts or {})}
    if host_code is not None:
        properties[HOST_CODE_KEY] = host_code
    onnx.helper.set_model_props(model, properties)
    contents = {ENGINE_FILES[flavour]: model.SerializeToString()}
    contents |= {name: text.encode() for name, text in (texts or {}).items()}
    files = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        files[name] = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    text = replace(
        manifest.engines.text, file=ENGINE_FILES[flavour], tensorrt=facts_for(flavour, manifest, **(facts or {}))
    )
    written = replace(
        manifest,
        target=TARGETS[flavour],
        engines=replace(manifest.engines, text=text),
        text=text_files(files),
        files=files,
    )
    (folder / MANIFEST_NAME).write_text(written.to_json(), encoding="utf-8")
    return folder


def export_tensorrt_bundle(
    checkpoint: Path,
    folder: Path,
    flavour: str,
    *,
    dtype: ir.DataType = ir.DataType.FLOAT,
    max_context: int = 600,
    max_batch: int = 4,
    prefill_chunk: int = 16,
    logits_rows: int | None = None,
    lower: Callable[[Traced], Traced] = standard.lower,
) -> Path:
    """A checkpoint's standard lowering, or one with plugins, as a bundle for the double.

    It has tokenizer and defaults if the checkpoint has any.
    """
    capacity = cache_capacity(max_context, prefill_chunk)
    scratch = folder.with_name(f"{folder.name}-onnx")
    scratch.mkdir(parents=True)
    with open_checkpoint(checkpoint) as source:
        config, texts = source.config, dict(source.tokenizer.files)
        speculates = logits_rows is not None
        traced = lower(trace(config, dtype, positions=capacity, capacity=capacity, speculates=speculates))
        stitch(traced, source, scratch / DATA_FILE)
        model = onnx.load(save_graph(traced, scratch))
        if "generation_config.json" in texts or (checkpoint / "generation_config.json").is_file():
            texts["generation_config.json"] = (checkpoint / "generation_config.json").read_text(encoding="utf-8")
    inputs, outputs = (tuple(map(_io_tensor, values)) for values in (model.graph.input, model.graph.output))
    manifest = replace(
        make_manifest(
            inputs=inputs,
            outputs=outputs,
            max_context=max_context,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            logits_rows=logits_rows,
            vocab_size=config.vocab_size,
            cache_dtype=next(t.dtype for t in inputs if t.name.startswith(CACHE_PREFIX)),
        ),
        model=ModelFacts(
            name=checkpoint.name,
            model_type=config.model_type,
            num_parameters=num_parameters(config),
            vocab_size=config.vocab_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
            pad_token_id=config.pad_token_id,
            source=dict(source.source),
        ),
    )
    has_plugins = lower is not standard.lower
    return write_tensorrt_bundle(folder, model, manifest, flavour, texts=texts, plugins=has_plugins)


def add_vision(bundle: Path, checkpoint: Path, flavour: str, *, max_images: int = 2) -> None:
    """Gives a bundle for the double the vision engine of its checkpoint, of runs of up to so many images."""
    scratch = bundle.with_name(f"{bundle.name}-vision")
    scratch.mkdir()
    with open_checkpoint(checkpoint) as source:
        traced = standard.lower(trace_vision(source.config))
        hashes = stitch(traced, source, scratch / DATA_FILE)
        model = onnx.load(save_graph(traced, scratch))
    inputs, outputs = (tuple(map(_io_tensor, values)) for values in (model.graph.input, model.graph.output))
    profile = {t.name: [_sizes(t, {"B": (1, max_images)}, end) for end in (0, 0, 1)] for t in inputs}
    metadata = {"profiles": [profile], "weight_bytes": WEIGHT_BYTES, "activation_bytes": ACTIVATION_BYTES}
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata)})
    content = model.SerializeToString()
    name = f"vision{Path(ENGINE_FILES[flavour]).suffix}"
    (bundle / name).write_bytes(content)
    manifest = Manifest.from_json((bundle / MANIFEST_NAME).read_text(encoding="utf-8"))
    vision = VisionEngine(
        file=name,
        precision="fp32",
        quantization={},
        weight_encodings=WeightEncodings({}, {}),
        weight_hashes=hashes,
        inputs=inputs,
        outputs=outputs,
        tensorrt=replace(facts_for(flavour, manifest), cache_bytes=0),
        plan=None,
        max_batch=max_images,
    )
    entry = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    written = replace(manifest, engines=replace(manifest.engines, vision=vision), files={**manifest.files, name: entry})
    (bundle / MANIFEST_NAME).write_text(written.to_json(), encoding="utf-8")


def _sizes(tensor: IoTensor, ranges: Mapping[str, tuple[int, int]], end: int) -> list[int]:
    return [dim if isinstance(dim, int) else ranges[dim][end] for dim in tensor.shape]


def _io_tensor(value: onnx.ValueInfoProto) -> IoTensor:
    kind = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return IoTensor(value.name, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape)
