"""What only a model of a real width shows: how weights are stored, and the scratch memory that a step needs."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.variants import VARIANTS
from qwen_aot.runtime.bundle.load import load_bundle
from tests.tools import require_package

require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
pytestmark = pytest.mark.trt

_TOKENS = {"vocab_size": 4096, "bos_token_id": 1, "pad_token_id": None, "eos_token_ids": (2,)}
DENSE = dataclasses.replace(VARIANTS["qwen1.5-0.5b"], num_hidden_layers=2, **_TOKENS)
_MIXTURE = VARIANTS["qwen1.5-moe-a2.7b"]
assert _MIXTURE.moe is not None
MIXTURE = dataclasses.replace(  # 60 experts, but narrow
    _MIXTURE,
    hidden_size=256,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_hidden_layers=2,  # the last layer's experts see one token a row only
    moe=dataclasses.replace(
        _MIXTURE.moe,
        moe_intermediate_size=352,
        shared_expert_intermediate_size=352,
        sparse_layers=frozenset({0, 1}),
    ),
    **_TOKENS,
)


def build(config: ModelConfig, spec: BuildSpec, out: Path, caplog: pytest.LogCaptureFixture) -> tuple[int, list[int]]:
    """Bytes of the engine, and of scratch memory of the prefill and the decode profile, as the builder tells them."""
    with caplog.at_level(logging.DEBUG, "qwen_aot.engines.tensorrt.messages"):
        build_bundle(RandomCheckpoint(config), spec, out)
    scratch = [int(found) for found in re.findall(r"Total Activation Memory: (\d+) bytes", caplog.text)]
    assert len(scratch) == 2
    return (out / "engine.rtx").stat().st_size, scratch


def spec_of(precision: Precision, **request: int) -> BuildSpec:
    options = TensorRtOptions(compute_capabilities=("8.9",))
    return BuildSpec(target=Target.TENSORRT_RTX, precision=precision, tensorrt=options, **request)


NARROW = dataclasses.replace(
    DENSE, hidden_size=512, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1408
)


@pytest.mark.parametrize(
    ("changes", "request_"),
    [
        ({}, {"max_context": 192, "prefill_chunk": 64}),
        ({}, {"max_context": 1024, "prefill_chunk": 128}),
        ({}, {"max_context": 4096, "prefill_chunk": 128}),  # copies of the window begin to outweigh the workspace
        ({}, {"max_context": 4096, "prefill_chunk": 1, "max_batch": 4}),
        ({"num_key_value_heads": 2}, {"max_context": 1024, "prefill_chunk": 256}),
        ({"intermediate_size": 5632}, {"max_context": 1024, "prefill_chunk": 256}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "0.5b",
)
def test_the_estimate_of_activations_is_near_the_builders_figure(
    changes: dict[str, int], request_: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, spec = dataclasses.replace(NARROW, **changes), spec_of(Precision.FP16, **request_)
    _, scratch = build(config, spec, tmp_path / "bundle", caplog)
    facts = load_bundle(tmp_path / "bundle").manifest.engines.text.tensorrt
    assert facts is not None
    assert facts.builder_activation_bytes == facts.activation_bytes == max(scratch)
    assert facts.activation_bytes_estimated == footprint(config, spec).activation_bytes_estimated
    assert 0.95 < facts.activation_bytes_estimated / max(scratch) < 1.35


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16, Precision.INT8, Precision.INT4, Precision.FP8])
def test_weights_are_stored_once_and_as_asked(
    precision: Precision, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Folded up to fp16, or kept by both profiles, they would take at least half as much again."""
    spec = spec_of(precision)
    engine, scratch = build(DENSE, spec, tmp_path / "bundle", caplog)
    planned = footprint(DENSE, spec)
    kernels = 8_000_000  # docs/tensorrt.md: 5 to 7 MB in 2 layers
    assert planned.weight_bytes < engine < 1.1 * planned.weight_bytes + kernels
    plain = footprint(DENSE, spec_of(Precision.FP16)).weight_bytes
    folded = plain if precision in (Precision.INT8, Precision.INT4, Precision.FP8) else 2 * planned.weight_bytes
    assert 1.1 * planned.weight_bytes + kernels < folded  # what is refused above
    assert max(scratch) == scratch[0]
    assert 0.95 < planned.activation_bytes_estimated / scratch[0] < 1.35
    # A decode step holds a copy of the window, and dequantizes no matrix into scratch memory.
    window = 2 * 2 * (4096 + 512) * DENSE.key_value_size
    assert window <= scratch[1] < 1.1 * window


@pytest.mark.slow
def test_more_rows_take_no_more_scratch_memory_to_prefill(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The runtime prefills one row at a time. Decode copies a window for each; weights are still stored once."""
    sizes = []
    for rows in (1, 4):
        caplog.clear()
        spec = spec_of(Precision.FP16, max_batch=rows)
        sizes.append(build(DENSE, spec, tmp_path / f"bundle{rows}", caplog))
        planned = footprint(DENSE, spec)
        assert 0.95 < planned.activation_bytes_estimated / max(sizes[-1][1]) < 1.35
        assert sizes[-1][0] < planned.weight_bytes + 8_000_000
    (_, one), (_, four) = sizes
    assert four[0] == one[0]
    assert 3.9 < four[1] / one[1] < 4.1


@pytest.mark.parametrize("chunk", [32, 128])
def test_a_prefill_step_has_no_room_for_the_experts_of_all_its_tokens(
    chunk: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The branch that gathers experts is for 5 tokens at most; the builder must not plan it for a chunk."""
    spec = spec_of(Precision.FP16, prefill_chunk=chunk, max_context=256)
    _, (prefill, _) = build(MIXTURE, spec, tmp_path / "bundle", caplog)
    gathered = 2 * 4 * 3 * 256 * 352  # of one token
    assert prefill < 3 * 5 * gathered < chunk * gathered
    assert 0.95 < footprint(MIXTURE, spec).activation_bytes_estimated / prefill < 1.35
