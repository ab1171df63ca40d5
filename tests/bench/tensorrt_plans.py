"""What TensorRT-RTX makes of each precision: plans of two-layer cuts of published shapes, as `inspect` shows them.

    python -m tests.bench.tensorrt_plans
    python -m tests.bench.tensorrt_plans --rows 4 --only 1.8b

Needs a TensorRT-RTX package (pip install tensorrt-rtx-cu13), no GPU, and some two minutes. The widths are the published
ones, weights are random, the vocabulary has 4,096 words, and MoE-A2.7B 8 experts of its 60. int8-sq and fp8-sq are
given as checkpoints whose codes and scales are random too: plans don't depend on numbers. A build that is refused
prints why.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.errors import DeployError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.encoding import CodeType
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model.variants import variant_config
from qwen_aot.runtime.cli.inspect import show
from qwen_aot.runtime.cli.inspect_bundle import facts
from tests.coded_checkpoints import LINEAR, WHOLE_ROW, CodedCheckpoint, Coding

LAYERS, VOCABULARY, EXPERTS = 2, 4096, 8
DENSE, MOE = "qwen1.5-1.8b", "qwen1.5-moe-a2.7b"
ROUNDED = {"int8-sq": CodeType.INTEGER, "fp8-sq": CodeType.E4M3}
CASES = [*((DENSE, precision) for precision in ("fp16", "int8", *ROUNDED, "int4"))]
CASES += [(MOE, precision) for precision in ("fp16", *ROUNDED, "int8")]


def cut(variant: str) -> Checkpoint:
    """Random weights of a published shape, two layers of it."""
    config = variant_config(variant)
    moe = config.moe
    if moe is not None:
        moe = dataclasses.replace(moe, num_experts=EXPERTS, sparse_layers=frozenset(range(LAYERS)))
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_ids": (2,), "pad_token_id": None}
    shape = {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "moe": moe}
    return RandomCheckpoint(dataclasses.replace(config, **shape, **ids))


def rounded_cut(variant: str, code_type: CodeType) -> Checkpoint:
    """The same whose projections are codes of 8 bits with scales of their inputs; experts and gates are plain."""
    config = variant_config(variant)
    shape: dict[str, Any] = {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "layers": LAYERS,
        "vocab": VOCABULARY,
        "max_position_embeddings": config.max_position_embeddings,
    }
    if config.moe is not None:
        shape["moe"] = {
            "num_experts": EXPERTS,
            "num_experts_per_tok": config.moe.num_experts_per_tok,
            "moe_intermediate_size": config.moe.moe_intermediate_size,
            "shared_expert_intermediate_size": config.moe.shared_expert_intermediate_size,
        }
    return CodedCheckpoint(functools.partial(_coding, code_type), **shape)


def _coding(code_type: CodeType, name: str) -> Coding | None:
    is_rounded = LINEAR.search(name) is not None and ".experts." not in name
    return Coding(8, WHOLE_ROW, input_scale=0.0625, code_type=code_type) if is_rounded else None


def print_plan(variant: str, precision: str, rows: int, folder: Path) -> None:
    """Builds one case and prints the tables of its plan, or why it isn't built."""
    print(f"\n## {variant}, {LAYERS} layers, {precision}, {rows} rows\n", flush=True)
    code_type = ROUNDED.get(precision)
    spec = BuildSpec(
        target="tensorrt-rtx",
        precision=precision if code_type is None else None,
        max_batch=rows,
        tensorrt=TensorRtOptions(compute_capabilities=("8.9",)),
    )
    try:
        build_bundle(cut(variant) if code_type is None else rounded_cut(variant, code_type), spec, folder)
    except DeployError as error:
        print(f"refused: {error}", flush=True)
        return
    bundle = facts(folder, with_hash=False)
    engine = json.loads((folder / "manifest.json").read_text())["files"]["engine.rtx"]["bytes"]
    sizes = {"kind": f"{precision}, weights and engine", "path": f"{bundle['weight_bytes']:,} and {engine:,} bytes"}
    show({**sizes, "plan": bundle["plan"]}, is_folded=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of a variant's name")
    arguments = parser.parse_args()
    for variant, precision in CASES:
        if arguments.only in variant:
            with tempfile.TemporaryDirectory() as folder:
                print_plan(variant, precision, arguments.rows, Path(folder) / "bundle")


if __name__ == "__main__":
    main()
