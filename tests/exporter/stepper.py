"""Steps a lowered graph on ONNX Runtime with plain NumPy: the exporter's tests need no runtime package of ours.

A graph with own CPU kernels gets their library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from qwen_aot.exporter.lowering.ort.kernels import CPU_DOMAIN
from tests.cpu_kernels import own_kernels

_NUMPY = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    onnx.TensorProto.INT8: np.int8,
}


def open_session(model: Path | bytes) -> ort.InferenceSession:
    """A CPU session that keeps the graph's own numbers (no silent int8 activations)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Else signed activations become unsigned ones, whose products with int8 saturate on CPUs without VNNI.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    content = onnx.load(model, load_external_data=False) if isinstance(model, Path) else onnx.load_from_string(model)
    if any(opset.domain == CPU_DOMAIN for opset in content.opset_import):
        options.register_custom_ops_library(str(own_kernels()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Stepper:
    """A KV cache of `rows` rows and `capacity` tokens around one session, past and present in one buffer."""

    def __init__(self, model: Path, rows: int, capacity: int, fill: float = 0.0) -> None:
        self.session = open_session(model)
        inputs = onnx.load(model, load_external_data=False).graph.input
        self.names = [value.name for value in inputs]
        self.capacity = capacity
        self.lengths = np.zeros(rows, np.int64)
        self.rotary_offsets = np.zeros(rows, np.int64)  # of a graph with several rotary tables
        self.cache = {}
        for value in inputs:
            if value.name.startswith("past_key_values."):
                dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
                dtype = _NUMPY[value.type.tensor_type.elem_type]
                content = np.iinfo(np.int8).max if dtype == np.int8 and np.isnan(fill) else fill
                self.cache[value.name] = np.full((rows, dims[1], capacity, *dims[3:]), content, dtype)

    def step(self, tokens: Sequence[Sequence[int]], pad: int = 0) -> NDArray[np.float32]:
        """Appends tokens (one list a row, [] for an idle row), right-padded; returns logits [B, V]."""
        return self._step(tokens, pad, 1, "logits")

    def step_last(self, tokens: Sequence[Sequence[int]], told: int, pad: int = 0) -> NDArray[np.float32]:
        """The same; returns the logits of each row's last tokens [B, told, V]."""
        return self._step(tokens, pad, told, "last_logits")

    def _step(self, tokens: Sequence[Sequence[int]], pad: int, told: int, output: str) -> NDArray[np.float32]:
        B, S = len(tokens), max(1, max(map(len, tokens)) + pad)
        ids = np.zeros((B, S), np.int64)
        for row, new in enumerate(tokens):
            ids[row, : len(new)] = new
        new_tokens = np.array([len(new) for new in tokens], np.int64)
        window = int(self.lengths.max()) + S
        assert window <= self.capacity
        feeds = {
            "input_ids": ids,
            "position_ids": self.lengths[:, None] + np.arange(S),
            "cache_length": self.lengths,
            "new_tokens": new_tokens,
            "key_positions": np.arange(window),
            "logits_positions": np.arange(told),
            **{name: self.rotary_offsets for name in self.names if name.startswith("rotary_offset.")},
        }
        binding = self.session.io_binding()
        binding.bind_output(output)
        for name, value in feeds.items():
            if name in self.names:
                binding.bind_cpu_input(name, value)
        caches = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.cache.items()}
        for name, value in caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self.session.run_with_iobinding(binding)
        for name, value in caches.items():
            self.cache[name] = value.numpy().copy()
        self.lengths = self.lengths + new_tokens
        logits: NDArray[np.float32] = binding.copy_outputs_to_cpu()[0]
        return logits

    def greedy(self, prompt: Sequence[int], steps: int) -> list[int]:
        """One row: the prompt, then `steps` greedy tokens."""
        token = int(self.step([list(prompt)])[0].argmax())
        made = [token]
        while len(made) < steps:
            token = int(self.step([[token]])[0].argmax())
            made.append(token)
        return made
