"""A target is one row and one builder: that the rows are whole, and what is derived of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_aot.engines.builders import builder_for
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.flavours import FLAVOURS
from qwen_aot.engines.spec.precisions import Precision, combinations
from qwen_aot.engines.spec.targets import TARGETS, Target, facts_of
from qwen_aot.errors import BuildError
from qwen_aot.exporter.lowering.ort.provider import PROVIDERS, Provider


def test_every_target_has_facts_and_precisions() -> None:
    assert list(TARGETS) == list(Target)
    assert set(Target) == {row.target for row in combinations()}


@pytest.mark.parametrize("target", Target)
def test_a_target_names_its_builder(target: Target) -> None:
    builder = builder_for(target)
    for step in ("require", "lower", "finish", "check"):
        assert callable(getattr(builder, step))


@pytest.mark.parametrize(("target", "provider"), [(Target.CPU, Provider.CPU), (Target.CUDA, Provider.CUDA)])
def test_what_the_planner_knows_of_a_provider_is_what_its_lowering_does(target: Target, provider: Provider) -> None:
    planned, lowered = TARGETS[target], PROVIDERS[provider]
    assert (planned.quantized_experts == "yes") == lowered.has_quantized_experts
    assert planned.always_zero_points == (not lowered.has_default_zero_point)


def test_an_engines_file_has_its_flavours_suffix() -> None:
    suffixes = {name: Path(TARGETS[Target(name)].engine_file).suffix for name in FLAVOURS}
    assert suffixes == {name: flavour.suffix for name, flavour in FLAVOURS.items()}


@pytest.mark.parametrize(
    ("target", "precision", "chunk", "context", "compute_type"),
    [
        ("cpu", "int4", 256, 32768, "FLOAT"),
        ("cuda", "fp16", 512, 32768, "FLOAT16"),
        ("tensorrt-rtx", "fp16", 512, 4096, "FLOAT16"),
        ("tensorrt", "fp16", 512, 4096, "FLOAT16"),
    ],
)
def test_what_is_built_when_nothing_is_asked(
    target: str, precision: str, chunk: int, context: int, compute_type: str
) -> None:
    spec = BuildSpec(target=Target(target))
    assert (spec.precision, spec.prefill_chunk) == (precision, chunk)
    assert (spec.context_for(32768), spec.context_for(1024)) == (context, 1024)
    plain = next(row for row in combinations() if row.target == target)
    assert plain.compute_type == compute_type


def test_what_compiles_is_what_has_a_library() -> None:
    compiled = [target for target in Target if TARGETS[target].compiles]
    assert compiled == list(FLAVOURS) == ["tensorrt-rtx", "tensorrt"]
    assert all(TARGETS[target].has_fixed_capacity and not TARGETS[target].can_verify_here for target in compiled)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_stages_of_a_graph_that_is_served_as_it_is(target: str) -> None:
    stages = ("trace", "lower", "write weights", "hash", "load check")
    assert facts_of(target).stage_names() == stages
    assert facts_of(target).stage_names(with_verify=True) == (*stages, "verify")


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
def test_stages_of_an_engine_that_is_compiled(target: str) -> None:
    assert facts_of(target).stage_names() == ("trace", "lower", "write weights", "compile", "hash", "check")


def test_the_host_and_the_card() -> None:
    assert [str(target) for target in Target if not TARGETS[target].runs_on_gpu] == ["cpu"]
    assert facts_of("cuda").layer_provider == "CUDAExecutionProvider"
    assert {facts_of(name).layer_provider for name in ("cpu", *FLAVOURS)} == {"CPUExecutionProvider"}


@pytest.mark.parametrize(
    ("target", "arena", "workspace", "copies"),
    [
        ("cpu", 2, 0, False),
        ("cuda", 2, 0, False),
        ("tensorrt-rtx", 1, 8_192_000, True),
        ("tensorrt", 1, 8_192_000, True),
    ],
)
def test_what_a_step_takes(target: str, arena: int, workspace: int, copies: bool) -> None:
    memory = facts_of(target).memory
    assert (memory.arena_factor, memory.workspace_bytes, memory.copies_window) == (arena, workspace, copies)


def test_a_target_of_another_version_is_refused() -> None:
    with pytest.raises(BuildError, match="target 'npu' doesn't exist; what exists: cpu, cuda, tensorrt-rtx, tensorrt"):
        facts_of("npu")


def test_only_blocks_have_fast_prefill() -> None:
    assert [str(row.target) for row in combinations() if row.choices.fast_prefill] == ["cpu", "cpu"]
    assert {facts_of(name).weight_layout for name in FLAVOURS} == {"dequantized"}
    assert BuildSpec(precision=Precision.INT8, fast_prefill=True).quantization["fast_prefill"] is True
