"""The model's bytes and products against what the compiled kernels do, counted while their PTX is executed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen_aot.plugins.performance.costs import Cost, attention_costs, expert_costs, linear_costs
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep
from tests.plugins.ptx.interpreter import Counts, Interpreter
from tests.plugins.ptx.steps import CompiledSteps

if not IS_INTERPRETED:
    pytest.skip("PTX is executed on the CPU only", allow_module_level=True)

SM = "8.9"  # of the library that is built anyway
SECTOR_BYTES = 32
MMA_FLOPS = 2 * 16 * 8 * 16  # of an m16n8k16, all threads of a warp together

# Tensors that make up nearly all of a launch's bytes. Of them each sector is asked for once by each program that needs
# it: loads are whole, and none is repeated. Of the others several warps ask for the same few.
BULK_READ = ("qkv", "key", "value", "hidden", "inner", "gate_up", "down", "x", "codes")
BULK_WRITTEN = ("query", "key", "value", "output", "inner")


@pytest.fixture(scope="module")
def compiled(plugin_build: Path, ptx_interpreter: Path) -> CompiledSteps:
    kernels = plugin_build / "build" / "kernels" / f"sm_{SM.replace('.', '')}"
    return CompiledSteps(Interpreter(ptx_interpreter), kernels)


def check(costs: list[Cost], counts: dict[str, Counts]) -> None:
    for cost in costs:
        counted = counts[cost.variant.name]
        assert counted.executed("mma") * MMA_FLOPS == cost.tensor_flops, cost.variant.name
        for bulk, modelled, sectors in (
            (BULK_READ, cost.reads, counted.read_sectors),
            (BULK_WRITTEN, cost.writes, counted.written_sectors),
        ):
            for name in modelled.keys() & set(bulk):
                assert sectors[name] * SECTOR_BYTES == modelled[name].requested, f"{cost.variant.name}: {name}"
        assert {name for name, size in counted.read.items() if size} <= set(cost.reads), cost.variant.name
        assert {name for name, size in counted.written.items() if size} == set(cost.writes), cost.variant.name


@pytest.mark.parametrize(
    ("new", "cached", "group", "head_dim", "is_int8", "batch", "tactic"),
    [
        (1, 700, 1, 64, False, 2, 1),
        (1, 1500, 5, 128, True, 1, 1),
        (1, 511, 16, 64, True, 2, 2),
        (130, 0, 2, 64, False, 1, 1),
        (130, 70, 1, 64, False, 1, 2),
        (70, 301, 1, 128, True, 2, 1),
        (200, 90, 5, 128, False, 1, 1),
        (200, 90, 1, 128, False, 1, 2),
    ],
)
def test_attention(
    new: int, cached: int, group: int, head_dim: int, is_int8: bool, batch: int, tactic: int, compiled: CompiledSteps
) -> None:
    heads = {"num_kv_heads": 2, "head_dim": head_dim, "capacity": 4096, "tactic": tactic}
    lengths = [(cached, new)] * batch
    step = GqaStep(lengths=lengths, steps=new, group=group, is_int8=is_int8, sm_count=20, sm=SM, **heads)
    costs = attention_costs(
        SM,
        20,
        num_heads=2 * group,
        batch=batch,
        new=new,
        cached=cached,
        cache="int8" if is_int8 else "same",
        **heads,
    )
    check(costs, compiled.run(step)[1])


@pytest.mark.parametrize(
    ("form", "num_tokens", "tactic"),
    [("16", 1, 1), ("8", 5, 2), ("4z", 5, 1), ("16", 80, 1), ("4z", 80, 1), ("16", 80, 2), ("4", 80, 2)],
)
def test_experts(form: str, num_tokens: int, tactic: int, compiled: CompiledSteps) -> None:
    sizes = {"hidden_size": 256, "inner_size": 384, "tactic": tactic}
    step = MoeStep(num_tokens=num_tokens, num_experts=6, k=2, form=form, sm=SM, **sizes)
    costs = expert_costs(
        SM,
        counts=torch.bincount(step.tensors["expert_ids"].flatten().long(), minlength=6).tolist(),
        num_tokens=num_tokens,
        k=2,
        bits=int(form[:2].rstrip("z")),
        has_zeros=form == "4z",
        **sizes,
    )
    check(costs, compiled.run(step)[1])


@pytest.mark.parametrize(
    ("num_tokens", "form", "group_size", "columns", "tactic"),
    [
        (1, "4", 128, 256, 1),
        (5, "4", 128, 2048, 2),
        (16, "8", 256, 256, 2),
        (3, "4z", 32, 256, 1),
        (80, "4z", 128, 256, 1),
    ],
)
def test_linear(
    num_tokens: int, form: str, group_size: int, columns: int, tactic: int, compiled: CompiledSteps
) -> None:
    sizes = {"rows": 80, "columns": columns, "group_size": group_size, "has_bias": True, "tactic": tactic}
    step = LinearStep(num_tokens=num_tokens, form=form, sm_count=20, sm=SM, **sizes)
    costs = linear_costs(SM, 20, num_tokens=num_tokens, bits=int(form[0]), has_zeros=form == "4z", **sizes)
    check(costs, compiled.run(step)[1])
