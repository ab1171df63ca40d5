"""The lowered graph against a real parser and the real plugins: TensorRT-RTX creates them, and can't go on.

It has no plugin layers and aborts once a plugin is created, so that each parse is a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import plugin
from qwen_aot.exporter.lowering.tensorrt.plugin import PluginOptions
from qwen_aot.exporter.weights.stitch import stitch
from tests.checkpoints import save_tiny
from tests.tools import require_package

pytestmark = pytest.mark.trt
require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")

# Loads the plugins into the builder's own registry, as the build does, and prints what the library and parser log.
PARSE = """
import sys
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def __init__(self):
        super().__init__()

    def log(self, severity, message):
        print(message, flush=True)

logger = Logger()
builder = trt.Builder(logger)
assert builder.get_plugin_registry().load_library(sys.argv[1]) is not None
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
trt.OnnxParser(network, logger).parse_from_file(sys.argv[2])
"""

DENSE = {"heads": 6, "kv_heads": 2, "head_dim": 64, "hidden": 128, "layers": 1}
MOE = DENSE | {"moe": {"moe_intermediate_size": 128}}
GQA = "QwenGQA: created with num_heads=6, num_kv_heads=2, head_dim=64, cache_bits={}, norm_epsilon={}, scale=0.125"
EXPERTS = "QwenMoE: created with num_experts=4, experts_per_token=2, weight_bits={}, has_zeros=0"
WIDE = DENSE | {"intermediate": 256}
LINEAR = "QwenLinear: created with weight_bits={}, group_size={}, has_zeros=0, has_bias=1"


@pytest.mark.parametrize(
    ("config", "options", "created"),
    [
        (DENSE, {}, GQA.format(16, 0)),
        (DENSE, {"int8_cache": True, "weights": "int8"}, GQA.format(8, 0)),
        (DENSE | {"generation": "qwen3"}, {"int8_cache": True}, GQA.format(8, 1e-06)),
        (MOE, {"attention": "native"}, EXPERTS.format(16)),
        (MOE, {"attention": "native", "weights": "int8"}, EXPERTS.format(8)),
        (MOE, {"attention": "native", "weights": "int4"}, EXPERTS.format(4)),
        (WIDE, {"attention": "native", "weights": "int8", "linear": "plugin"}, LINEAR.format(8, -1)),
        (WIDE, {"attention": "native", "weights": "int4", "linear": "plugin"}, LINEAR.format(4, 128)),
    ],
    ids=["gqa", "gqa-int8", "gqa-norms", "moe", "moe-int8", "moe-int4", "linear-int8", "linear-int4"],
)
def test_the_parser_creates_the_plugins(
    config: dict[str, Any], options: dict[str, Any], created: str, plugin_library: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "checkpoint", **config)
    with open_checkpoint(tmp_path / "checkpoint") as source:
        traced = trace(source.config, ir.DataType.FLOAT16, positions=256, capacity=256)
        plugin.lower(traced, PluginOptions(**options))
        plugin.strip_definitions(traced)
        stitch(traced, source, tmp_path / DATA_FILE)
        graph = save_graph(traced, tmp_path)
    command = [sys.executable, "-c", PARSE, str(plugin_library), str(graph)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    assert created in done.stdout, done.stdout[-3000:] + done.stderr
