"""BuildSpec refuses what doesn't exist and names what does."""

from __future__ import annotations

import pytest

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Combination, Precision, combinations
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.errors import BuildError


@pytest.mark.parametrize("row", combinations(), ids=lambda row: f"{row.target}-{row.precision}")
def test_every_row_builds_with_its_defaults(row: Combination) -> None:
    spec = BuildSpec(target=row.target, precision=row.precision)
    assert spec.effective_block_size == (row.choices.block_sizes[0] if row.choices.block_sizes else None)
    if row.target is Target.CPU:
        recorded = {"block_size", "symmetric", "sensitive_bits", "fast_prefill"}
        assert set(spec.quantization) == (recorded if row.choices.block_sizes else set())


def test_strings_become_members() -> None:
    spec = BuildSpec(target="cpu", precision="int8")  # type: ignore[arg-type]
    assert spec.target is Target.CPU
    assert spec.precision is Precision.INT8


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"precision": "int8", "sensitive_bits": 4}, r"sensitive_bits 4 .*cpu int8 \(allowed: 8\)"),
        ({"precision": "fp32", "sensitive_bits": 8}, "none: fp32 isn't quantized"),
        ({"precision": "fp32", "fast_prefill": True}, "cpu fp32 has no fast prefill; it exists for: cpu: int8, int4"),
        ({"precision": "fp8"}, r"target cpu with precision fp8 doesn't exist; what exists: cpu: fp32, int8, int4;"),
        ({"target": "npu"}, r"target 'npu' doesn't exist; what exists: cpu"),
        ({"precision": "int4", "block_size": 48}, r"block_size 48 .*allowed: 16, 32, 64, 128, 256"),
        ({"precision": "fp32", "block_size": 32}, r"none: fp32 has no blocks"),
        ({"precision": "fp32", "symmetric": False}, r"no asymmetric form; it exists for: cpu: int8, int4"),
        ({"precision": "fp7"}, r"precision 'fp7' doesn't exist; what exists: cpu: fp32"),
        ({"tensorrt": TensorRtOptions(optimization_level=1)}, "target cpu takes no TensorRT options"),
        ({"max_batch": 0}, r"max_batch is 0; it must be at least 1"),
        ({"prefill_chunk": -1}, r"prefill_chunk is -1"),
        ({"max_context": 0}, r"max_context is 0"),
        ({"speculate": 1}, r"speculate is 1; accepted: 2 to 16 tokens that a step checks, no more than 16"),
        ({"speculate": 17}, r"speculate is 17; accepted: 2 to 16 "),
        ({"speculate": 9, "prefill_chunk": 8}, r"speculate is 9; accepted: 2 to 8 .* the prefill chunk's 8"),
        (
            {"speculate": 4, "target": "cuda"},
            r"doesn't exist for target cuda, .* exists for: cpu, tensorrt-rtx, tensorrt",
        ),
    ],
)
def test_refuses_by_name(request_, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BuildError, match=message):
        BuildSpec(**request_)


def test_context_defaults_to_the_models_and_is_capped_by_it() -> None:
    assert BuildSpec().context_for(32768) == 32768
    assert BuildSpec(max_context=4096).context_for(32768) == 4096
    with pytest.raises(BuildError, match="max_context 40000 is more than the model's 32768"):
        BuildSpec(max_context=40000).context_for(32768)


def test_a_prefill_chunk_longer_than_the_context_is_refused() -> None:
    assert BuildSpec(prefill_chunk=512).context_for(512) == 512
    assert BuildSpec(max_context=16).context_for(512) == 16  # the default chunk goes with every context
    with pytest.raises(BuildError, match="prefill_chunk 100000000 is more than the context of 512 tokens"):
        BuildSpec(prefill_chunk=100_000_000).context_for(512)
