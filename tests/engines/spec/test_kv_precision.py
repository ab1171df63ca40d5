"""What a cache may be stored as: each target and precision, and why not."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.kv_precision import KV_PRECISIONS
from qwen_aot.engines.spec.precisions import combinations, judged_as, plain_name
from qwen_aot.engines.spec.targets import TARGETS, Target
from qwen_aot.errors import BuildError


@pytest.mark.parametrize("combination", combinations(), ids=lambda each: f"{each.target}-{each.precision}")
def test_auto_and_its_own_type_are_the_compute_type(combination: Any) -> None:
    own = plain_name(combination.compute_type)
    for asked in ("auto", own):
        spec = BuildSpec(combination.target, combination.precision, kv_precision=asked)
        assert (spec.cache_type, spec.has_calibrated_cache) == (combination.compute_type, False)
    for other in set(KV_PRECISIONS) - {"auto", "int8", own}:
        with pytest.raises(BuildError, match=f"kv_precision {other} doesn't go with .*, which computes in {own}"):
            BuildSpec(combination.target, combination.precision, kv_precision=other)


@pytest.mark.parametrize(
    ("request_", "is_calibrated"),
    [
        ({"target": "cpu"}, True),
        ({"target": "cpu", "precision": "fp32"}, True),
        ({"target": "cpu", "precision": "int8", "fast_prefill": True}, True),
        ({"target": "tensorrt"}, False),
    ],
)
def test_int8_where_it_exists(request_: dict[str, Any], is_calibrated: bool) -> None:
    spec = BuildSpec(kv_precision="int8", **request_)
    assert (spec.cache_type, spec.has_calibrated_cache) == ("INT8", is_calibrated)


def test_int8_where_it_does_not() -> None:
    with pytest.raises(
        BuildError, match=r"int8 doesn't exist for target cuda; leave it out \(fp16\), or use one of: cpu, tens"
    ):
        BuildSpec(Target.CUDA, kv_precision="int8")
    with pytest.raises(BuildError, match=r"fp32 doesn't go with .*, or int8; accepted: auto, fp16, int8"):
        BuildSpec(Target.TENSORRT, kv_precision="fp32")
    with pytest.raises(BuildError, match=r"bf16 doesn't go with .* its own type; accepted: auto, fp16$"):
        BuildSpec(Target.CUDA, kv_precision="bf16")
    with pytest.raises(BuildError, match="kv_precision 'int2' doesn't exist; accepted: auto, fp32, fp16, bf16, int8"):
        BuildSpec(kv_precision="int2")


def test_a_calibration_is_a_stage_where_it_is_needed() -> None:
    facts = TARGETS[Target.CPU]
    assert "calibrate" not in facts.stage_names()
    assert facts.stage_names(with_calibration=True)[1:4] == ("lower", "calibrate", "write weights")


def test_an_int8_cache_is_judged_as_int8_at_best() -> None:
    assert judged_as("fp32", {}, "int8") == judged_as("fp16", {}, "int8") == "int8"
    assert judged_as("fp32", {}, "float32") == judged_as("fp32", {}) == "fp32"
    assert judged_as("int4", {"block_size": 64}, "int8") == "int4"
    assert judged_as("int4", {"own_codes": True}, "int8") == "int8"
