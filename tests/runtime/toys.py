"""Toy bundles for the runtime's tests: graphs small enough to be computed by hand, with real caches."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qwen_aot.runtime.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    ROTARY_OFFSET,
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

VOCAB_SIZE = 211  # a prime: checksums spread over it
HEADS, HEAD_DIM = 2, 8
ALL_INPUTS = ("input_ids", "position_ids", "cache_length", "new_tokens", "key_positions")

CACHE_STEP = 1 / 32  # what a code of an int8 cache is worth
_ONNX_TYPES = {
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
}


def checksum(token_ids: list[int], rotary_offset: int = 0) -> int:
    """The next token of the checksum model: every id and its place count, and where its rotary table begins."""
    return sum((place + 1 + rotary_offset) * token_id for place, token_id in enumerate(token_ids)) % VOCAB_SIZE


def make_manifest(
    *,
    inputs: tuple[IoTensor, ...] = (),
    outputs: tuple[IoTensor, ...] = (),
    files: Mapping[str, FileEntry] | None = None,
    max_context: int = 1000,
    max_batch: int = 4,
    prefill_chunk: int = 8,
    cache_dtype: str = "float32",
    vocab_size: int = VOCAB_SIZE,
    bos_token_id: int | None = None,
    eos_token_ids: tuple[int, ...] = (),
    logits_rows: int | None = None,
) -> Manifest:
    """A manifest around a toy; with `logits_rows`, what goes with it stands behind the given inputs and outputs."""
    profiles = [Profile("prefill", 1, prefill_chunk), Profile("decode", 1, 1)]
    if logits_rows is not None:
        profiles.append(Profile("verify", 2, logits_rows))
        if not any(tensor.name == "logits_positions" for tensor in inputs):
            inputs = (*inputs, IoTensor("logits_positions", "int64", ("T",)))
            outputs = (*outputs, IoTensor("last_logits", "float32", ("B", "T", vocab_size)))
    return Manifest(
        format_version=FORMAT_VERSION,
        model=ModelFacts(
            name="toy",
            model_type="qwen2",
            num_parameters=1,
            vocab_size=vocab_size,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=max_context,
            bos_token_id=bos_token_id,
            eos_token_ids=eos_token_ids,
            pad_token_id=None,
            source={"format": "toy"},
        ),
        target="cpu",
        engines=Engines(
            text=TextEngine(
                file="model.onnx",
                precision="fp32",
                quantization={},
                weight_encodings=WeightEncodings(kept={}, requantized={}),
                weight_hashes=None,
                inputs=inputs,
                outputs=outputs,
                tensorrt=None,
                plan=None,
                profiles=tuple(profiles),
                cache_dtype=cache_dtype,
                logits_rows=logits_rows,
            ),
            vision=None,
        ),
        max_context=max_context,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
        text=TextFiles(tokenizer=None, compiled_tokenizer=None, compiled_chat_template=None),
        default_max_new_tokens=None,
        tool_versions={},
        files=files or {"model.onnx": FileEntry(0, hashlib.sha256().hexdigest())},
    )


def with_text_engine(manifest: Manifest, **fields: Any) -> Manifest:
    """The same bundle with another text engine: `fields` are of its entry."""
    return replace(manifest, engines=replace(manifest.engines, text=replace(manifest.engines.text, **fields)))


def text_files(names: Collection[str]) -> TextFiles:
    """What a bundle with these files says of its tokenizer."""
    return TextFiles("tokenizer.json" if "tokenizer.json" in names else None, None, None)


def io_tables(
    names: tuple[str, ...], cache_dtype: str, capacity: int | str = "C", vocab_size: int = VOCAB_SIZE
) -> tuple[tuple[IoTensor, ...], tuple[IoTensor, ...]]:
    """Inputs and outputs of a one-layer toy that takes the named inputs beside its cache."""
    shapes: dict[str, tuple[int | str, ...]] = {
        "input_ids": ("B", "S"),
        "position_ids": ("B", "S"),
        "cache_length": ("B",),
        "new_tokens": ("B",),
        "key_positions": ("W",),
        "logits_positions": ("T",),
    }
    cache: tuple[int | str, ...] = ("B", HEADS, capacity, HEAD_DIM)
    inputs = [IoTensor(name, "int64", ("B",) if name.startswith(ROTARY_OFFSET) else shapes[name]) for name in names]
    inputs += [IoTensor(f"past_key_values.0.{part}", cache_dtype, cache) for part in ("key", "value")]
    outputs = [IoTensor("logits", "float32", ("B", vocab_size))]
    if "logits_positions" in names:
        outputs.append(IoTensor("last_logits", "float32", ("B", "T", vocab_size)))
    outputs += [IoTensor(f"present.0.{part}", cache_dtype, cache) for part in ("key", "value")]
    return tuple(inputs), tuple(outputs)


def write_bundle(
    folder: Path, model: onnx.ModelProto, manifest: Manifest, texts: Mapping[str, str] | None = None
) -> Path:
    """Writes a bundle with this graph and text files; returns its folder."""
    folder.mkdir(parents=True)
    contents = {"model.onnx": model.SerializeToString()}
    contents |= {name: text.encode() for name, text in (texts or {}).items()}
    files = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        files[name] = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    text = replace(manifest, files=files, text=text_files(files)).to_json()
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return folder


def checksum_model(
    inputs: tuple[IoTensor, ...], outputs: tuple[IoTensor, ...], vocab_size: int = VOCAB_SIZE
) -> onnx.ModelProto:
    """Logits peak at `checksum` of the row's tokens, read back from the cache.

    The key cache holds the ids, the value cache position + 1 (and the row's rotary offset, where the graph has that
    input), both in all heads and dimensions. The graph
    keeps section 3 of the design: TensorScatter refuses writes past the capacity, a window that is too short
    or a wrong length changes the sum, and an idle row with an empty cache turns all logits into NaN. With the input
    logits_positions there are those of the last tokens too.
    """
    b = _GraphBuilder()
    has_positions = any(tensor.name == "logits_positions" for tensor in inputs)
    positions = "logits_positions" if has_positions else b.ints([0])
    shape = b.node(
        "Concat",
        [
            b.node("Shape", ["cache_length"]),
            b.ints([HEADS]),
            b.node("Shape", ["input_ids"], start=1),
            b.ints([HEAD_DIM]),
        ],
        axis=0,
    )
    parts = {}
    one = b.ints([1])
    places = b.node("Add", ["position_ids", one])
    for offset in (tensor.name for tensor in inputs if tensor.name.startswith(ROTARY_OFFSET)):
        places = b.node("Add", [places, b.node("Unsqueeze", [offset, one])])
    for part, source in (("key", "input_ids"), ("value", places)):
        update = b.node("Cast", [source], to=TensorProto.FLOAT)
        update = b.node("Expand", [b.node("Unsqueeze", [update, b.ints([1, 3])]), shape])
        present = b.node(
            "TensorScatter",
            [f"past_key_values.0.{part}", update, "cache_length"],
            output=f"present.0.{part}",
            axis=2,
        )
        window = b.node("Slice", [present, b.ints([0]), b.node("Shape", ["key_positions"]), b.ints([2])])
        parts[part] = b.node("Cast", [window], to=TensorProto.DOUBLE)  # sums pass 2^24
    offset = b.node("Sub", [positions, b.node("Shape", [positions])])  # [T]: -T ... -1
    place = b.node("Add", [b.node("Unsqueeze", ["new_tokens", one]), offset])
    place = b.node("Max", [place, b.ints([0])])  # [B, T]
    last = b.node("Add", [b.node("Unsqueeze", ["cache_length", one]), place])
    mask = b.node("LessOrEqual", ["key_positions", b.node("Unsqueeze", [last, b.ints([2])])])
    mask = b.node("Cast", [mask], to=TensorProto.DOUBLE)  # [B, T, W]
    products = b.node("Mul", [parts["key"], parts["value"]])
    products = b.node("ReduceMean", [products, b.ints([1, 3])], keepdims=0)  # [B, W]
    total = b.node("MatMul", [mask, b.node("Unsqueeze", [products, b.ints([2])])])  # [B, T, 1]
    target = b.node("Mod", [b.node("Cast", [total], to=TensorProto.INT64), b.ints([VOCAB_SIZE])])
    distance = b.node("Sub", [b.ints(list(range(vocab_size))), target])  # [B, T, V]
    distance = b.node("Cast", [b.node("Abs", [distance])], to=TensorProto.FLOAT)
    is_empty = b.node("Equal", [b.node("Add", ["cache_length", "new_tokens"]), b.ints([0])])
    is_any_empty = b.node("ReduceMax", [b.node("Cast", [is_empty], to=TensorProto.INT64)], keepdims=0)
    is_any_empty = b.node("Cast", [is_any_empty], to=TensorProto.BOOL)
    nan_or_zero = b.node("Where", [is_any_empty, b.floats([float("nan")]), b.floats([0.0])])
    told = b.node("Sub", [nan_or_zero, distance], output="last_logits" if has_positions else None)
    b.node("Gather", [told, b.constant(np.array(-1))], output="logits", axis=1)
    return b.model("checksum", inputs, outputs)


def attention_model(
    inputs: tuple[IoTensor, ...], outputs: tuple[IoTensor, ...], table: np.ndarray, head: np.ndarray
) -> onnx.ModelProto:
    """One GroupQueryAttention over embedded ids (q = k = v = their embedding), then a linear head.

    A code of an int8 cache is worth CACHE_STEP, in every channel.

    Args:
        inputs: without position_ids and key_positions.
        outputs: as `io_tables` gives them.
        table: float32 [V, HEADS * HEAD_DIM].
        head: float32 [HEADS * HEAD_DIM, V].
    """
    b = _GraphBuilder()
    onnx_type = _ONNX_TYPES[next(t.dtype for t in inputs if t.name.startswith("past_key_values."))]
    hidden = b.node("Gather", [b.constant(table), "input_ids"])
    is_int8 = onnx_type == TensorProto.INT8
    query = hidden if is_int8 else b.node("Cast", [hidden], to=onnx_type)
    one = b.ints([1])
    lengths = b.node("Sub", [b.node("Add", ["cache_length", "new_tokens"]), one])
    seqlens_k = b.node("Cast", [lengths], to=TensorProto.INT32)
    capacity = b.node("Squeeze", [b.node("Shape", ["past_key_values.0.key"], start=2, end=3)])
    total = b.node("Cast", [capacity], to=TensorProto.INT32)
    query_lengths = b.node("Cast", ["new_tokens"], to=TensorProto.INT32)
    operands = [query, query, query, "past_key_values.0.key", "past_key_values.0.value", seqlens_k, total]
    scales = [b.constant(np.full(HEADS * HEAD_DIM, CACHE_STEP, np.float32))] * 2 if is_int8 else [""] * 2
    quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    attention = b.node(
        "GroupQueryAttention",
        operands + [""] * 5 + scales + [""] * 2 + [query_lengths],
        extra_outputs=["present.0.key", "present.0.value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=HEADS,
        **(quantized if is_int8 else {}),
    )
    last = b.node("Max", [b.node("Sub", ["new_tokens", one]), b.ints([0])])  # [B]
    picked = b.node("GatherND", [attention, b.node("Unsqueeze", [last, one])], batch_dims=1)
    b.node("MatMul", [b.node("Cast", [picked], to=TensorProto.FLOAT), b.constant(head)], output="logits")
    return b.model("attention", inputs, outputs)


class _GraphBuilder:
    """Collects nodes and constants under numbered names."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def node(
        self,
        op: str,
        operands: list[str],
        *,
        output: str | None = None,
        extra_outputs: list[str] | None = None,
        domain: str = "",
        **attributes: int | str,
    ) -> str:
        name = output or f"v{len(self._nodes)}"
        outputs = [name, *(extra_outputs or [])]
        self._nodes.append(helper.make_node(op, operands, outputs, domain=domain, **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, values: list[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def floats(self, values: list[float]) -> str:
        return self.constant(np.array(values, np.float32))

    def model(self, name: str, inputs: tuple[IoTensor, ...], outputs: tuple[IoTensor, ...]) -> onnx.ModelProto:
        infos = [
            [helper.make_tensor_value_info(t.name, _ONNX_TYPES[t.dtype], t.shape) for t in tensors]
            for tensors in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, name, *infos, initializer=self._constants)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)
