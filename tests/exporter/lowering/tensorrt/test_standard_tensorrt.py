"""The standard graph as TensorRT-RTX's parser reads it: a network that needs no GPU."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.lowering.tensorrt.standard import StandardOptions
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.weights.stitch import stitch
from tests.exporter.graph.test_trace import DENSE, MOE
from tests.tools import require_package

pytestmark = pytest.mark.trt
trt = require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")

CAPACITY = 64
GROUPED = dataclasses.replace(DENSE, num_key_value_heads=1)
TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)
WIDE = dataclasses.replace(DENSE, hidden_size=128, intermediate_size=256, head_dim=32)


class Parsed:
    """A parsed network, with what must outlive it."""

    def __init__(self, config: ModelConfig, folder: Path, dtype: ir.DataType, weights: Any = None) -> None:
        traced = standard.lower(trace(config, dtype, positions=CAPACITY, capacity=CAPACITY), StandardOptions(weights))
        stitch(traced, RandomCheckpoint(config), folder / DATA_FILE)
        self._keep = (logger := trt.Logger(trt.Logger.ERROR), builder := trt.Builder(logger))
        flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = builder.create_network(flag)
        self._parser = trt.OnnxParser(self.network, logger)
        self.is_parsed = self._parser.parse_from_file(str(save_graph(traced, folder)))
        self.errors = [self._parser.get_error(index).desc() for index in range(self._parser.num_errors)]

    @property
    def layers(self) -> list[Any]:
        return [self.network.get_layer(index) for index in range(self.network.num_layers)]

    @property
    def counts(self) -> Counter[str]:
        return Counter(layer.type.name for layer in self.layers)


FORMS = [
    *((config, dtype, None) for config in ("dense", "grouped", "tied", "moe") for dtype in ("FLOAT16", "BFLOAT16")),
    ("dense", "FLOAT", None),
    *((config, "FLOAT16", form) for config in ("dense", "wide") for form in ("int8", "int4", "fp8")),
]
CONFIGS = {"dense": DENSE, "grouped": GROUPED, "tied": TIED, "moe": MOE, "wide": WIDE}


@pytest.mark.parametrize(("config", "dtype", "weights"), FORMS)
def test_every_form_is_parsed_with_caches_updated_in_place(config, dtype, weights, tmp_path):
    model = CONFIGS[config]
    parsed = Parsed(model, tmp_path, ir.DataType[dtype], weights)
    assert parsed.is_parsed, parsed.errors
    counts = parsed.counts
    assert counts["KV_CACHE_UPDATE"] == 2 * model.num_hidden_layers
    assert counts["ATTENTION_INPUT"] == model.num_hidden_layers
    assert counts["ROTARY_EMBEDDING"] == 2 * model.num_hidden_layers
    assert counts["DEQUANTIZE"] == (4 * model.num_hidden_layers if weights else 0)


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_codes_are_dequantized_where_they_are_read_and_nowhere_else(weights, tmp_path):
    parsed = Parsed(WIDE, tmp_path, ir.DataType.FLOAT16, weights)
    stored = {"int8": trt.int8, "int4": trt.int4, "fp8": trt.fp8}[weights]
    for layer in parsed.layers:
        quantized = [
            index for index in range(layer.num_inputs) if (tensor := layer.get_input(index)) and tensor.dtype == stored
        ]
        assert quantized == ([0] if layer.type == trt.LayerType.DEQUANTIZE else [])


def test_few_tokens_multiply_gathered_experts(tmp_path):
    """In the branch of few tokens both expert matrices come out of a Gather of the chosen ones."""
    parsed = Parsed(MOE, tmp_path, ir.DataType.FLOAT16)
    assert MOE.moe is not None
    gathered = [
        layer
        for layer in parsed.layers
        if layer.type == trt.LayerType.GATHER
        and len(layer.get_output(0).shape) == 4
        and layer.get_output(0).shape[1] == MOE.moe.num_experts_per_tok
        and layer.get_input(0).shape[0] == MOE.moe.num_experts
    ]
    assert len(gathered) == 2 * len(MOE.moe.sparse_layers)


def test_a_tied_embedding_is_one_constant(tmp_path):
    parsed = Parsed(TIED, tmp_path, ir.DataType.FLOAT16)
    shape = (TIED.vocab_size, TIED.hidden_size)
    tables = [
        layer
        for layer in parsed.layers
        if layer.type == trt.LayerType.CONSTANT and tuple(layer.get_output(0).shape) == shape
    ]
    assert len(tables) == 1
