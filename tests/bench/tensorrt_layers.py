"""Layers that TensorRT-RTX's parser makes of one decoder layer, by type: the traced graph and the lowered one.

    python -m tests.bench.tensorrt_layers

Prints a table in Markdown. Needs a TensorRT-RTX package (pip install tensorrt-rtx-cu13), no GPU. What is counted is the
difference of two depths, so that what stands outside the layers doesn't count; sizes don't matter, so models are small.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering import passes
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.lowering.tensorrt.quantized import WeightFormat
from qwen_aot.exporter.lowering.tensorrt.standard import StandardOptions
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.variants import variant_config
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch

CAPACITY = 64


def small(variant: str, layers: int) -> ModelConfig:
    """A variant's kind of model at sizes that parse at once."""
    config = variant_config(variant)
    moe = config.moe
    if moe is not None:
        moe = dataclasses.replace(
            moe,
            num_experts=8,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
            sparse_layers=frozenset(range(layers)),
        )
    return dataclasses.replace(
        config,
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        moe=moe,
        bos_token_id=None,
        eos_token_ids=(0,),
        pad_token_id=None,
    )


def inline(traced: Traced) -> Traced:
    """The definitions of our ops in place, and no pass of ours but the removal of what nothing reads."""
    passes.inline_definitions(traced)
    passes.remove_unused_inputs(traced)
    traced.recipes = {
        name: recipe for name, recipe in traced.recipes.items() if name in traced.model.graph.initializers
    }
    return traced


def lower(weights: WeightFormat | None = None) -> Callable[[Traced], Traced]:
    """The standard lowering with weights of a form."""
    return lambda traced: standard.lower(traced, StandardOptions(weights))


FORMS: Mapping[str, tuple[str, Callable[[Traced], Traced]]] = {
    "dense traced": ("qwen1.5-0.5b", inline),
    "dense fp16": ("qwen1.5-0.5b", lower()),
    "dense int8": ("qwen1.5-0.5b", lower("int8")),
    "dense int4": ("qwen1.5-0.5b", lower("int4")),
    "moe traced": ("qwen1.5-moe-a2.7b", inline),
    "moe fp16": ("qwen1.5-moe-a2.7b", lower()),
}


def parsed_layers(traced: Traced) -> Counter[str]:
    """Layer type -> count in the parsed network.

    Raises:
        RuntimeError: the parser refuses the graph.
    """
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stitch(traced, RandomCheckpoint(traced.config), folder / DATA_FILE)
        if not parser.parse_from_file(str(save_graph(traced, folder))):
            raise RuntimeError(f"the parser refuses the graph: {parser.get_error(0).desc()}")
        return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def layers_of_one(variant: str, finish: Callable[[Traced], Traced]) -> Counter[str]:
    """Layer type -> count in one decoder layer that isn't the last."""
    few, many = (
        parsed_layers(finish(trace(small(variant, count), ir.DataType.FLOAT16, capacity=CAPACITY, positions=CAPACITY)))
        for count in (3, 4)
    )
    return many - few


def main() -> None:
    """Prints the table."""
    columns = {name: layers_of_one(*form) for name, form in FORMS.items()}
    total: Counter[str] = Counter()
    for column in columns.values():
        total |= column
    print("| layers of one decoder layer |", " | ".join(columns), "|")
    print("| --- " * (len(columns) + 1) + "|")
    for kind, _ in total.most_common():
        print(f"| {kind} |", " | ".join(str(column[kind]) for column in columns.values()), "|")
    print("| all |", " | ".join(str(sum(column.values())) for column in columns.values()), "|")


if __name__ == "__main__":
    main()
