"""What is said of builds without flags is what the targets' lowerings then do, of checkpoints of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwen_aot.engines.builders import builder_for
from qwen_aot.engines.planner.default_builds import default_builds
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.own_codes import settled
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.tensorrt import builder as tensorrt_builder
from qwen_aot.errors import BuildError, ExportError
from qwen_aot.exporter.checkpoint.encoding import CodeType
from qwen_aot.exporter.checkpoint.storage import storage_of
from qwen_aot.exporter.graph.trace import trace
from tests.coded_checkpoints import MOE, WHOLE_ROW, CodedCheckpoint, Coding

PLUGIN_MOE = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
# Kind -> the checkpoint, and the targets that refuse it.
KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "dense": ({"coding": Coding(4, 64, zero_points=True)}, set()),
    "groups that no block holds": ({"coding": Coding(4, 24)}, set(Target)),
    "fp32 scales": ({"coding": Coding(4, 64, scale_dtype=np.dtype(np.float32))}, {"cuda", "tensorrt-rtx", "tensorrt"}),
    "rounded inputs": ({"coding": Coding(8, WHOLE_ROW, input_scale=0.0625)}, {"cuda"}),
    "rounded inputs, floats": (
        {"coding": Coding(8, WHOLE_ROW, input_scale=0.0625, code_type=CodeType.E4M3)},
        {"cpu", "cuda"},
    ),
    "experts": ({"coding": Coding(4, 32), "moe": MOE}, {"cuda", "tensorrt-rtx", "tensorrt"}),
    "experts as the plugin has them": ({"coding": Coding(4, 128), "moe": PLUGIN_MOE}, {"cuda", "tensorrt-rtx"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_refuses_what_is_said_to_be_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "find_plugin_library", lambda given: None)
    options, refused = KINDS[kind]
    source = CodedCheckpoint(**options)
    storage = storage_of(source)
    builds = list(default_builds(source.config, storage))
    assert [build.target for build in builds] == list(Target)
    assert {build.target for build in builds if build.refusal is not None} == refused
    for build in builds:
        if "whose products round their inputs" in (build.refusal or ""):
            assert build.precision == ("int8" if kind == "rounded inputs" else "fp8")
            with pytest.raises(BuildError) as caught:
                settled(BuildSpec(target=build.target), storage)
            assert str(caught.value) == build.refusal
            continue
        spec = settled(BuildSpec(target=build.target), storage)
        assert (build.precision, build.own_codes) == (spec.precision, True)
        traced = trace(source.config, ir.DataType[spec.combination.compute_type], positions=64, capacity=64)
        traced.store_as(storage)
        if build.refusal is None:
            builder_for(build.target).lower(traced, spec)
            continue
        with pytest.raises(ExportError):
            builder_for(build.target).lower(traced, spec)
        assert "accepted" in build.refusal or "fp16 does" in build.refusal


def test_plain_numbers_get_the_targets_default() -> None:
    source = CodedCheckpoint(lambda _: None)
    found = {build.target: build for build in default_builds(source.config, storage_of(source))}
    assert {target: build.precision for target, build in found.items()} == {
        target: BuildSpec(target=target).precision for target in Target
    }
    assert not any(build.own_codes or build.refusal for build in found.values())


def test_any_other_error_is_no_refusal_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(spec: BuildSpec, storage: object) -> BuildSpec:
        raise BuildError("another reason")

    monkeypatch.setattr("qwen_aot.engines.planner.default_builds.settled", wrong)
    source = CodedCheckpoint(Coding(4, 64))
    with pytest.raises(BuildError, match="another reason"):
        list(default_builds(source.config, storage_of(source)))
