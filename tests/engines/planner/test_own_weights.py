"""Planned bytes of checkpoints that keep their codes, against graphs that were really lowered: exact."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwen_aot.engines.onnxruntime import cpu, cuda
from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.planner.plans import plans
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.own_codes import settled
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.storage import Storage, storage_of
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.runtime.bundle.manifest import cache_capacity
from tests.coded_checkpoints import CODINGS, LINEAR, MOE, WHOLE_ROW, CodedCheckpoint, Coding

traced_once = functools.cache(trace)
Lower = Callable[[Traced, BuildSpec], Traced]


def lower_standard(traced: Traced, spec: BuildSpec) -> Traced:
    return standard.lower(traced, standard.StandardOptions(None, spec.tensorrt.quantize_head, own_codes=True))


def lower_plugin(traced: Traced, spec: BuildSpec) -> Traced:
    return plugin.lower(traced, plugin.PluginOptions(None, own_codes=True, linear=spec.linear))


TARGETS: dict[str, tuple[dict[str, Any], Lower]] = {
    "cpu": ({}, cpu.lower),
    "cpu, tables of 8 bits": ({"sensitive_bits": 8}, cpu.lower),
    "cpu, fast prefill": ({"fast_prefill": True}, cpu.lower),
    "cuda": ({"target": Target.CUDA}, cuda.lower),
    "cuda, tables of 8 bits": (
        {"target": Target.CUDA, "sensitive_bits": 8, "precision": Precision.INT4},
        cuda.lower,
    ),
    "tensorrt": ({"target": Target.TENSORRT_RTX}, lower_standard),
    "tensorrt, plugins": ({"target": Target.TENSORRT}, lower_plugin),
    "tensorrt, plugins, projections too": (
        {"target": Target.TENSORRT, "tensorrt": TensorRtOptions(linear="plugin")},
        lower_plugin,
    ),
    "tensorrt, int8 head": (
        {
            "target": Target.TENSORRT_RTX,
            "precision": Precision.INT4,
            "tensorrt": TensorRtOptions(quantize_head=True),
        },
        lower_standard,
    ),
}


def with_table(name: str) -> Coding | None:
    """The embedding too is codes."""
    return Coding(4, 32, zero_points=True) if LINEAR.search(name) or "embed_tokens" in name else None


def with_minimums_of_halves(name: str) -> Coding | None:
    """The embedding too has minimums."""
    return Coding(4, 32, offsets=True) if LINEAR.search(name) or "embed_tokens" in name else None


MODELS: dict[str, dict[str, Any]] = {
    **{name: {"coding": CODINGS[name]} for name in ("4 bits", "4 bits, zero points", "mixed", "whole rows")},
    "different orders": {"coding": CODINGS["an order of its own each"]},
    "tied": {"coding": Coding(4, 64, zero_points=True), "tied": True},
    "tied, in codes": {"coding": with_table, "tied": True},
    "fp32 tables": {"coding": Coding(4, 32), "plain_dtype": np.float32},
    "bf16 tables": {"coding": Coding(4, 32), "plain_dtype": ml_dtypes.bfloat16},
    "experts": {"coding": Coding(4, 32, zero_points=True), "moe": MOE},
    "experts, padded": {"coding": Coding(4, 64), "moe": MOE},
    "experts of the plugin": {
        "coding": Coding(4, 128, zero_points=True),
        "moe": MOE | {"moe_intermediate_size": 256},
    },
    "8 bits": {"coding": Coding(8, 32)},
    "wide": {"coding": Coding(4, 64, zero_points=True), "intermediate": 256},  # blocks and sizes of QwenLinear
    "wide, 8 bits": {"coding": Coding(8, 128), "intermediate": 256},
    "rounded inputs": {"coding": Coding(8, WHOLE_ROW, input_scale=0.0625), "tied": True},
    "minimums": {"coding": CODINGS["minimums"], "tied": True},
    "minimums, table in codes": {"coding": with_minimums_of_halves, "tied": True},
}
FIRST = (
    "rounded inputs",
    "4 bits, zero points",
    "mixed",
    "tied",
    "experts",
    "experts of the plugin",
    "minimums, table in codes",
    "wide",
)
CASES = [
    pytest.param(model, target, marks=() if model in FIRST or target == "cpu" else pytest.mark.deep)
    for model in MODELS
    for target, (options, _) in TARGETS.items()
    if not ("experts" in model and "cpu" not in target and ("plugin" not in model or "plugin" not in target))
    and not (model in ("8 bits", "wide, 8 bits", "rounded inputs") and "precision" in options)
    and not (model == "rounded inputs" and ("cuda" in target or "fast" in target))
    and not ("in codes" in model and "of 8 bits" in target)
]
made = functools.cache(lambda name: CodedCheckpoint(**MODELS[name]))


@pytest.mark.parametrize(("model", "target"), CASES)
def test_weights_are_planned_to_the_byte(model: str, target: str) -> None:
    source, (options, lower) = made(model), TARGETS[target]
    storage = storage_of(source)
    spec = settled(BuildSpec(max_context=128, prefill_chunk=64, **options), storage)
    assert spec.own_codes
    positions = cache_capacity(128, 64)
    once = traced_once(source.config, ir.DataType[spec.combination.compute_type], positions=positions)
    traced = Traced(once.model.clone(), once.config, dict(once.recipes))
    traced.store_as(storage)
    lowered = lower(traced, spec)
    stored = sum(output.nbytes for recipe in lowered.recipes.values() for output in recipe.outputs)
    assert footprint(source.config, spec, storage).weight_bytes == stored


def test_a_plan_is_of_the_checkpoints_own_codes_and_says_what_conflicts() -> None:
    source = made("4 bits")
    storages = {"m": storage_of(source)}
    models = [("m", source.config)]
    precisions = (None, Precision.INT4, Precision.INT8, Precision.FP16)
    own, same, other, floats = plans(models, ["rtx-4090"], precisions=precisions, max_context=64, storages=storages)
    assert own.spec.own_codes and own.spec.precision == "int4" and own.fits
    assert same.footprint == own.footprint
    assert other.refusal is not None and "accepted: int4" in other.refusal and not other.fits
    assert floats.fits and floats.footprint.weight_bytes > own.footprint.weight_bytes


def test_experts_in_codes_are_refused_for_tensorrt() -> None:
    source = made("experts")
    (found,) = plans([("m", source.config)], ["rtx-4090"], max_context=64, storages={"m": storage_of(source)})
    assert found.refusal is not None and "no experts with a checkpoint's own codes" in found.refusal


def test_own_codes_have_no_size_without_the_checkpoint() -> None:
    with pytest.raises(BuildError, match="give its storage"):
        footprint(made("4 bits").config, BuildSpec(own_codes=True, max_context=64))


def test_what_is_smaller_than_floats_is_the_own_codes_alone() -> None:
    source = made("4 bits")
    config = dataclasses.replace(source.config, vocab_size=1 << 24)
    storage = Storage(storage_of(source).encodings, {}, storage_of(source).dtypes)
    (found,) = plans(
        [("m", config)], ["orin-nano-8gb"], precisions=(Precision.FP16,), max_context=64, storages={"m": storage}
    )
    assert not found.fits and "int8" not in found.remedy
