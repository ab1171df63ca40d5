"""Plans: what fits really does, the next larger doesn't, and what is advised fits."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.engines.planner.devices import DEVICES
from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.planner.plans import Plan, largest_batch, longest_context, plan, plans, refusal_of
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.spec.targets import Target
from qwen_aot.errors import BuildError, ExportError
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.model.tensors import num_parameters
from qwen_aot.exporter.model.variants import VARIANTS
from tests.variants import SWEPT

PRECISIONS = ("fp16", "bf16", "int8", "int4", "fp8")


def spec_of(precision: str, target: str = "tensorrt", **request: Any) -> BuildSpec:
    return BuildSpec(target=Target(target), precision=Precision(precision), **request)


def planned(variant: str, device: str, spec: BuildSpec) -> Plan:
    return plan(variant, VARIANTS[variant], spec, device)


VARIANT = st.sampled_from(list(SWEPT))
DEVICE = st.sampled_from(list(DEVICES))
PRECISION = st.sampled_from(PRECISIONS)
CONTEXT = st.integers(1, 8192)  # which every variant has


@settings(deadline=None)
@given(VARIANT, PRECISION, st.integers(1, 64), st.integers(10**8, 4 * 10**11))
def test_the_longest_context_fits_and_one_token_more_does_not(
    variant: str, precision: str, batch: int, usable: int
) -> None:
    config, spec = VARIANTS[variant], spec_of(precision, max_batch=batch)
    found = longest_context(config, spec, usable)

    def fits(context: int) -> bool:
        return footprint(config, dataclasses.replace(spec, max_context=context)).total_bytes <= usable

    assert found == 0 or fits(found)
    assert found == config.max_position_embeddings or not fits(found + 1)


@settings(deadline=None)
@given(VARIANT, PRECISION, CONTEXT, st.integers(10**8, 4 * 10**11))
def test_the_largest_batch_fits_and_one_row_more_does_not(
    variant: str, precision: str, context: int, usable: int
) -> None:
    context = min(context, VARIANTS[variant].max_position_embeddings)
    config, spec = VARIANTS[variant], spec_of(precision, max_context=context)
    found = largest_batch(config, spec, usable)

    def fits(batch: int) -> bool:
        return footprint(config, dataclasses.replace(spec, max_batch=batch)).total_bytes <= usable

    assert found == 0 or fits(found)
    assert not fits(found + 1)


@settings(deadline=None)
@given(VARIANT, DEVICE, PRECISION, CONTEXT, st.integers(1, 64))
def test_a_plan_agrees_with_itself(variant: str, device: str, precision: str, context: int, batch: int) -> None:
    context = min(context, VARIANTS[variant].max_position_embeddings)
    found = planned(variant, device, spec_of(precision, max_context=context, max_batch=batch))
    if found.refusal is not None:
        assert (found.fits, found.longest_context, found.largest_batch, found.remedy) == (False, 0, 0, "")
        return
    assert found.fits == (found.missing_bytes == 0)
    assert found.fits == (found.longest_context >= context) == (found.largest_batch >= batch)
    assert found.fits == (found.remedy == "")


@settings(deadline=None)
@given(VARIANT, DEVICE, PRECISION, CONTEXT, st.integers(1, 64))
def test_what_a_remedy_names_fits(variant: str, device: str, precision: str, context: int, batch: int) -> None:
    context = min(context, VARIANTS[variant].max_position_embeddings)
    spec = spec_of(precision, max_context=context, max_batch=batch)
    remedy = planned(variant, device, spec).remedy
    if not remedy or remedy.startswith("nothing fits"):
        return
    for choice in remedy.split("; "):
        named = re.fullmatch(r"(\w+) fits(?: with (.+))?", choice)
        assert named is not None, choice
        joint = " and " in (named[2] or "")
        changes = {kind: int(number) for kind, number in re.findall(r"a (context|batch) of (\d+)", named[2] or "")}
        trials = [changes] if joint or not changes else [{kind: number} for kind, number in changes.items()]
        for trial in trials:
            request: dict[str, Any] = {
                "max_context": trial.get("context", context),
                "max_batch": trial.get("batch", batch),
            }
            assert planned(variant, device, spec_of(named[1], **request)).fits, choice


def test_remedies_by_name() -> None:
    assert planned("qwen1.5-7b", "orin-nx-16gb", spec_of("fp16")).remedy == "int8 fits"
    assert re.fullmatch(
        r"fp16 fits with a context of \d+ or a batch of 3; int8 fits",
        planned("qwen1.5-7b", "rtx-4090", spec_of("fp16", max_batch=5)).remedy,
    )
    assert re.fullmatch(
        r"int4 fits with a batch of 1 and a context of \d+",
        planned("qwen1.5-7b", "orin-nano-8gb", spec_of("fp16", max_batch=16)).remedy,
    )


def test_where_nothing_fits_the_plan_says_by_how_much() -> None:
    found = planned("qwen1.5-110b", "rtx-4060", spec_of("fp16"))
    least = footprint(VARIANTS["qwen1.5-110b"], spec_of("int4", max_context=1)).total_bytes
    missing = least - DEVICES["rtx-4060"].usable_bytes
    assert found.remedy == f"nothing fits: even int4 with one token in one row lacks {missing / 1e9:.3g} GB"
    assert found.missing_bytes == found.footprint.total_bytes - DEVICES["rtx-4060"].usable_bytes


@pytest.mark.parametrize("device", DEVICES)
def test_fp8_is_refused_below_sm_8_9(device: str) -> None:
    found = planned("qwen1.5-0.5b", device, spec_of("fp8"))
    if "orin" in device:
        assert found.refusal == "fp8 needs SM 8.9 or later, and this is SM 8.7; int8 is as small"
    else:
        assert found.refusal is None and found.fits


@pytest.mark.parametrize(
    ("device", "target", "precision", "message"),
    [
        ("orin-nx-16gb", "tensorrt-rtx", "fp16", "target tensorrt-rtx doesn't run on SM 8.7; targets here: tensorrt"),
        ("rtx-4090", "cpu", "int4", "target cpu runs in the host's memory, which a card doesn't share"),
    ],
)
def test_targets_that_a_device_does_not_run(device: str, target: str, precision: str, message: str) -> None:
    refusal = planned("qwen1.5-0.5b", device, spec_of(precision, target=target)).refusal
    assert refusal is not None and message in refusal


def test_experts_are_not_quantized_for_cuda() -> None:
    int4 = planned("qwen1.5-moe-a2.7b", "rtx-4090", spec_of("int4", target="cuda", max_context=512))
    assert int4.refusal == "quantized experts don't exist for cuda (int4 asked for); fp16 does"
    assert planned("qwen1.5-moe-a2.7b", "rtx-5090", spec_of("fp16", target="cuda", max_context=512)).fits
    assert planned("qwen1.5-7b", "rtx-4090", spec_of("int4", target="cuda", max_context=512)).fits


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_experts_are_not_quantized_for_tensorrt(precision: str) -> None:
    spec = spec_of(precision, target="tensorrt-rtx", max_context=512)
    refusal = planned("qwen1.5-moe-a2.7b", "rtx-4090", spec).refusal
    assert refusal is not None and "without a plugin" in refusal
    with pytest.raises(ExportError, match="QwenMoE plugin"):  # the build says the same
        traced = trace(VARIANTS["qwen1.5-moe-a2.7b"], ir.DataType.FLOAT16)
        standard.lower(traced, standard.StandardOptions(precision))


def test_plugins_read_quantized_experts() -> None:
    fp16, int8, int4, fp8 = (
        refusal_of(VARIANTS["qwen1.5-moe-a2.7b"], spec_of(precision, max_context=512), DEVICES["agx-orin-64gb"])
        for precision in ("fp16", "int8", "int4", "fp8")
    )
    assert (fp16, int8, int4) == (None, None, None)
    assert fp8 is not None and "SM 8.9" in fp8
    on_thor = refusal_of(VARIANTS["qwen1.5-moe-a2.7b"], spec_of("fp8", max_context=512), DEVICES["agx-thor-128gb"])
    assert on_thor == "fp8 experts don't exist in the plugin; int8 is as small"


def test_an_int8_cache_leaves_room_for_a_longer_context() -> None:
    own, int8 = (
        planned("qwen1.5-7b", "orin-nx-16gb", spec_of("int4", kv_precision=kv_precision))
        for kv_precision in ("auto", "int8")
    )
    assert int8.footprint.cache_bytes == own.footprint.cache_bytes * (128 + 2) // 256  # codes and a scale of 128
    assert own.longest_context < int8.longest_context
    assert int8.ceiling is not None and own.ceiling is not None and int8.ceiling > own.ceiling


def test_the_ceiling_is_bandwidth_over_bytes_of_a_step() -> None:
    """Of 7B in fp16 that is all but the embedding, and the cache: 2 x 32 layers x 4096 wide x 2 bytes a token."""
    config = VARIANTS["qwen1.5-7b"]
    found = planned("qwen1.5-7b", "rtx-4090", spec_of("fp16", max_context=2048))
    read = 2 * (num_parameters(config) - 151936 * 4096) + 2048 * 2 * 32 * 4096 * 2
    assert found.ceiling == pytest.approx(1008e9 / read, rel=0.001)


def test_rows_share_the_weights_that_a_step_reads() -> None:
    one, four = (planned("qwen1.5-7b", "rtx-5090", spec_of("int8", max_context=512, max_batch=b)) for b in (1, 4))
    assert one.ceiling is not None and four.ceiling is not None
    assert 3 * one.ceiling < four.ceiling < 4 * one.ceiling


def test_defaults_are_each_devices_target_at_its_default_precision() -> None:
    found = list(plans(SWEPT.items(), DEVICES))
    assert [(p.device, p.model) for p in found] == [(device, name) for device in DEVICES for name in SWEPT]
    assert {p.spec.precision for p in found} == {Precision.FP16}
    assert {p.context for p in found} == {4096}
    assert {p.spec.target for p in found if "rtx" in p.device} == {Target.TENSORRT_RTX}
    assert {p.spec.target for p in found if "rtx" not in p.device} == {Target.TENSORRT}


def test_precisions_of_one_model_stand_together() -> None:
    models = list(VARIANTS.items())[:2]
    found = plans(models, ["l4"], precisions=[Precision.INT8, Precision.INT4])
    assert [(p.model, p.spec.precision) for p in found] == [
        (name, precision) for name, _ in models for precision in ("int8", "int4")
    ]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_context": 40000}, "more than the model's 32768 tokens"),
        ({"precisions": ["fp32"]}, "target tensorrt with precision fp32 doesn't exist"),
    ],
)
def test_wrong_requests(request_, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BuildError, match=message):
        list(plans(SWEPT.items(), ["l4"], **request_))
