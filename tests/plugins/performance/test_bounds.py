import dataclasses

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.plugins.performance.bounds import ISSUES_PER_CYCLE, LATENCY_SECONDS, SM_LIMITS, Gpu, bound, occupancy
from qwen_aot.plugins.performance.costs import Access, Cost
from qwen_aot.plugins.performance.machine_code import MainLoop
from qwen_aot.plugins.performance.resources import Resources, recorded
from qwen_aot.plugins.variants import Variant

GPU = Gpu(sm="8.9", sm_count=10, clock_hz=1e9, bytes_per_second=1e11, tensor_flops=1e13, l2_bytes=1 << 20)
VARIANT = Variant("gqa_prefill", {}, {}, {}, num_warps=4, num_stages=3)
COST = Cost(
    VARIANT,
    launched=50,
    working=45,
    reads={"key": Access(8_000_000, 2_000_000), "query": Access(100_000, 100_000)},
    writes={"output": Access(300_000, 300_000)},
    tensor_flops=5_000_000,
    useful_flops=4_000_000,
    steps=20,
    total_steps=700,
)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident", "limited_by"),
    [
        (32, 0, 4, 12, "warps"),  # 48 warps
        (128, 0, 4, 4, "registers"),  # 128 · 32 · 4 = 16384 of 65536
        (129, 0, 4, 3, "registers"),  # rounded up to 136 a thread
        (32, 49 * 1024, 4, 2, "shared memory"),  # 50 KiB each with what the system takes, of 100 KiB
        (16, 0, 1, 24, "programs"),
    ],
)
def test_what_an_sm_holds(registers, shared, warps, resident, limited_by):
    cost = dataclasses.replace(COST, variant=dataclasses.replace(VARIANT, num_warps=warps))
    filled = occupancy(GPU, cost, Resources(registers, shared))
    assert (filled.resident, filled.limited_by) == (resident, limited_by)
    assert filled.warps == resident * warps / 48
    assert filled.waves == 45 / (resident * 10)


def test_each_bound():
    found = bound(GPU, COST, Resources(128, 0, loop=MainLoop(300)))  # 4 resident on 10 SMs: 2 waves of 45 programs
    assert found.memory == pytest.approx(2_400_000 / 1e11)
    assert found.tensor == pytest.approx(5_000_000 / 1e13)
    assert found.issue == pytest.approx(700 * 4 * 300 / (ISSUES_PER_CYCLE * 10 * 1e9))
    assert found.latency == pytest.approx(2 * (2 + 20 / 2) * LATENCY_SECONDS)
    assert found.seconds == found.memory and found.reason == "memory"
    assert (
        bound(GPU, dataclasses.replace(COST, tensor_flops=10**10), Resources(128, 0, loop=MainLoop(300))).reason
        == "tensor"
    )


def test_keys_and_values_beyond_l2_are_read_once_a_wave_of_their_readers():
    fits = dataclasses.replace(COST, live_bytes=1 << 20, readers=85)
    exceeds = dataclasses.replace(COST, live_bytes=(1 << 20) + 1, readers=85)  # 85 programs, 40 at once: three times
    used = Resources(128, 0, loop=MainLoop(1))
    assert bound(GPU, fits, used).memory == pytest.approx(2_400_000 / 1e11)
    assert bound(GPU, exceeds, used).memory == pytest.approx((2_400_000 + 2 * 2_000_000) / 1e11)


def test_unknown_limits():
    with pytest.raises(
        BuildError, match=r"limits of SM 7\.5 aren't listed; those of 8\.0, 8\.6, 8\.7, 8\.9, 9\.0, .* are"
    ):
        occupancy(dataclasses.replace(GPU, sm="7.5"), COST, Resources(32, 0))


def test_limits_are_listed_of_every_sm_whose_resources_are():
    assert list(SM_LIMITS) == list(recorded())
