"""What of the kernels' benchmark runs without a GPU."""

import dataclasses

import pytest
import torch

from qwen_aot.exporter.model.config import MoeConfig
from qwen_aot.exporter.model.variants import VARIANTS
from qwen_aot.plugins.performance.bounds import bound
from qwen_aot.plugins.performance.costs import attention_costs
from qwen_aot.plugins.performance.resources import resources_of
from qwen_aot.plugins.performance.tables import (
    MODELS,
    TOKENS,
    Step,
    attention,
    experts,
    gpu_of,
    projection_shapes,
    projections,
)
from qwen_aot.plugins.variants import TACTICS
from tests.bench.plugin_kernels import (
    L2_TIMES,
    MOST_COPIES,
    Row,
    attention_launches,
    bandwidth_of,
    copies_for,
    expert_launches,
    known_device,
    main,
    measured,
    predicted,
    projection_launches,
    report,
    tactics_report,
)
from tests.plugins.conftest import IS_INTERPRETED

GPU = gpu_of("l4")
CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    VARIANTS["qwen1.5-32b"], num_attention_heads=4, num_key_value_heads=2, head_dim=64, hidden_size=256
)
SMALL_MOE = dataclasses.replace(
    SMALL,
    model_type="qwen2_moe",
    moe=MoeConfig(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=0,
        norm_topk_prob=False,
        sparse_layers=frozenset(range(SMALL.num_hidden_layers)),
    ),
)


def cost():
    return attention_costs(
        "8.9", 58, num_heads=32, num_kv_heads=32, head_dim=128, batch=1, new=1, cached=4095, capacity=32768
    )[1]


def test_bandwidth_of_a_4090_from_what_its_driver_reports():
    assert bandwidth_of(10_501_000, 384) == pytest.approx(1008e9, rel=1e-3)


def test_cards_are_known_by_the_names_that_cuda_gives_them():
    assert known_device("NVIDIA GeForce RTX 4090").capability == (8, 9)
    assert known_device("NVIDIA L4").name == "NVIDIA L4"
    assert known_device("NVIDIA L40S") is None and known_device("Orin") is None


def test_copies_exceed_l2_and_fit_memory():
    assert copies_for(4 << 20, 8 << 20, 1 << 40) == 2 * L2_TIMES + 1
    assert copies_for(1 << 30, 8 << 20, 1 << 40) == 2
    assert copies_for(1 << 30, 8 << 20, 1 << 30) == 1
    assert copies_for(1, 8 << 20, 1 << 40) == MOST_COPIES


def test_a_prediction_is_the_models_or_that_of_memory():
    full = bound(GPU, cost(), resources_of("8.9", cost().variant))
    assert predicted(GPU, cost()) == (full.seconds, full.reason)
    unknown = dataclasses.replace(GPU, tensor_flops=0.0)
    assert predicted(unknown, cost()) == (cost().distinct_bytes / 300e9, "memory")
    assert predicted(dataclasses.replace(GPU, sm="7.5"), cost()) == predicted(unknown, cost())
    assert predicted(dataclasses.replace(GPU, sm="12.0"), cost())[0] >= cost().distinct_bytes / 300e9


def test_the_report_has_bandwidth_and_prediction():
    seconds = cost().distinct_bytes / 150e9  # half of the card's bandwidth
    row = measured("7b", GPU, cost(), seconds)
    assert row.share == pytest.approx(0.5)
    line = report(GPU, "NVIDIA L4", [row]).splitlines()[-1]
    assert (
        line.startswith("| 7b | gqa_decode | – |") and "| 150 | 50 % |" in line and line.endswith("| memory | 2.00 |")
    )


@pytest.mark.skipif(not IS_INTERPRETED, reason="kernels are interpreted without a GPU")
@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("step", [Step(2, 1, 300), Step(1, 40, 17)])
def test_attention_runs_and_is_what_the_model_counts(step, cache, tactic):
    launches = attention_launches(GPU, SMALL, step, cache, CPU, 512, tactic)
    for launch in launches:
        launch.run()
    assert [launch.variant for launch in launches] == [c.variant for c in attention(GPU, SMALL, step, cache, tactic)]
    assert torch.isfinite(launches[-1].arguments["output_ptr"]).all()


@pytest.mark.skipif(not IS_INTERPRETED, reason="kernels are interpreted without a GPU")
@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("tokens", [3, 20])
def test_experts_run_and_are_what_the_model_counts(tokens, bits, tactic):
    launches = expert_launches(GPU, SMALL_MOE, tokens, bits, CPU, tactic)
    for launch in launches:
        launch.run()
    costs = experts(GPU, SMALL_MOE, tokens, bits, tactic)
    assert any(f"-t{tactic}" in launch.variant.name for launch in launches)
    assert [launch.variant for launch in launches] == [c.variant for c in costs]
    ids = launches[-1].arguments["expert_ids_ptr"].flatten().long()
    assert sorted(torch.bincount(ids, minlength=4).tolist()) == sorted(
        (tokens * 2 // 4 + (e < tokens * 2 % 4)) for e in range(4)
    )
    assert torch.isfinite(launches[-1].arguments["output_ptr"]).all()


@pytest.mark.skipif(not IS_INTERPRETED, reason="kernels are interpreted without a GPU")
@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [3, 20])
def test_projections_run_and_are_what_the_model_counts(tokens, bits, tactic):
    shape, *_ = projection_shapes(SMALL).values()
    costs, *_ = projections(GPU, SMALL, tokens, bits, tactic)
    launches = projection_launches(GPU, costs[0], shape, tokens, bits, tactic, CPU)
    for launch in launches:
        launch.run()
    assert [launch.variant for launch in launches] == [c.variant for c in costs]
    assert f"-t{tactic}" in launches[0].variant.name
    codes = launches[0].arguments["weight_ptr"]
    assert codes.nbytes == costs[0].reads["codes"].distinct
    assert torch.isfinite(launches[-1].arguments["output_ptr"]).all()


def test_each_projection_of_a_dense_model_differs_in_its_tiles_by_tactic():
    for model in (model for model in MODELS if VARIANTS[model].moe is None):
        for tokens in TOKENS:
            first, second = (projections(GPU, VARIANTS[model], tokens, 4, tactic) for tactic in TACTICS)
            assert len(first) == len(second) == len(projection_shapes(VARIANTS[model]))
            assert all(a[0].variant != b[0].variant for a, b in zip(first, second, strict=True))


def tactic_row(case: str, kernel: str, microseconds: float, tactic: int | None) -> Row:
    return Row(case, kernel, microseconds * 1e-6, 1, 0.5, 1e-6, "memory", tactic)


def test_tactics_stand_side_by_side_with_all_kernels_of_a_step():
    rows = [
        tactic_row("attention", "gqa_decode", 7.0, None),
        tactic_row("down", "linear_decode", 10.0, 1),
        tactic_row("down", "linear_reduce", 3.0, 1),  # with which the first, whose product is faster, is slower
        tactic_row("down", "linear_decode", 12.0, 2),
        tactic_row("output", "linear_decode", 2.0, 2),
    ]
    header, rule, *lines = tactics_report(rows).splitlines()
    assert header.count("|") == rule.count("|") == 6
    assert lines == ["| down | 13.0 | 12.0 | 2 | 1.08 |", "| output | – | 2.0 | – | – |"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_needed(capsys):
    assert main([]) == 1
    assert "a GPU, its driver and a CUDA build of torch are needed" in capsys.readouterr().err
