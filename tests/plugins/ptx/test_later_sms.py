"""SMs whose large products use instructions of their own: which kernels can't be executed for that, and the rest.

Of fp16 alone. SM 12.1 lacks nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_aot.plugins import aot
from qwen_aot.plugins.variants import variants
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.device import check
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep
from tests.plugins.ptx.interpreter import Interpreter
from tests.plugins.ptx.steps import CompiledSteps

if not IS_INTERPRETED:
    pytest.skip("PTX is executed on the CPU only", allow_module_level=True)

pytestmark = pytest.mark.deep

# What an SM's tensor cores are driven by, and the kernels that have it.
OWN_INSTRUCTIONS = {"9.0": "wgmma.", "10.0": "tcgen05.", "11.0": "tcgen05.", "12.1": None}
LARGE_PRODUCTS = ("gqa_prefill", "moe_gate_up", "moe_down", "linear_prefill")
# Patterns of variants.
ATTENTION, EXPERTS, LINEAR = ("gqa_*-fp16-*",), ("moe_*-fp16*", "moe_[cs]*"), ("linear_*-fp16*",)

Compiled = Callable[[str, tuple[str, ...]], CompiledSteps]


@pytest.fixture(scope="module")
def compiled(interpreter: Interpreter, pytestconfig: pytest.Config) -> Compiled:
    """Of an SM, the variants of some patterns, compiled when they are first asked for and kept for the next session."""

    @functools.cache
    def of(sm: str, patterns: tuple[str, ...]) -> CompiledSteps:
        digits, folders = sm.replace(".", ""), []
        for pattern in patterns:
            name = "".join(filter(str.isalnum, pattern))
            folder = Path(pytestconfig.cache.mkdir(f"plugin_kernels_sm{digits}_{name}"))
            aot.build([sm], folder, only=pattern)
            folders.append(folder / f"sm_{digits}")
        return CompiledSteps(interpreter, *folders)

    return of


@pytest.mark.parametrize("only", [ATTENTION, EXPERTS, LINEAR], ids=["attention", "experts", "projections"])
@pytest.mark.parametrize("sm", OWN_INSTRUCTIONS)
def test_what_is_not_executed(sm: str, only: tuple[str, ...], compiled: Compiled, interpreter: Interpreter) -> None:
    steps = compiled(sm, only)
    own = OWN_INSTRUCTIONS[sm]
    for variant in variants(sm):
        if variant.name not in steps.variants:
            continue
        unknown = interpreter.load(steps.text(variant.name)).unknown
        is_lacking = own is not None and variant.kernel in LARGE_PRODUCTS and variant.constants["BLOCK_M"] >= 64
        assert any(form.startswith(own or "") for form in unknown) == is_lacking, f"{variant.name}: {unknown}"
        assert bool(unknown) == is_lacking, f"{variant.name}: {unknown}"


@pytest.mark.parametrize(
    ("is_int8", "head_dim", "group"),
    list(itertools.product((False, True), (64, 128), (1, 5))),
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("sm", OWN_INSTRUCTIONS)
def test_decode_attention(sm: str, is_int8: bool, head_dim: int, group: int, compiled: Compiled) -> None:
    lengths = [(63, 1), (5, 0), (700, 1)]
    step = GqaStep(lengths, 1, is_int8=is_int8, head_dim=head_dim, group=group, sm=sm, sm_count=64)
    check(step, compiled(sm, ATTENTION).run(step)[0])


EXPERT_WEIGHTS = [("16", 1), ("16", 2), ("8", 1), ("8", 2), ("4", 1), ("4", 2), ("4z", 1)]


@pytest.mark.parametrize(("form", "tactic"), EXPERT_WEIGHTS)
@pytest.mark.parametrize("sm", OWN_INSTRUCTIONS)
def test_few_tokens(sm: str, form: str, tactic: int, compiled: Compiled) -> None:
    step = MoeStep(3, form=form, hidden_size=256, sm=sm, tactic=tactic)
    check(step, compiled(sm, EXPERTS).run(step)[0])


@pytest.mark.parametrize("form", ["16", "8", "4", "4z"])
@pytest.mark.parametrize("sm", OWN_INSTRUCTIONS)
def test_many_tokens_in_blocks_of_32(sm: str, form: str, compiled: Compiled) -> None:
    """Which tensor cores of every SM multiply as a warp's own."""
    step = MoeStep(70, form=form, hidden_size=256, sm=sm, tactic=2)
    check(step, compiled(sm, EXPERTS).run(step)[0])


@pytest.mark.parametrize(
    ("is_int8", "head_dim", "tactic"),
    [(False, 64, 1), (False, 64, 2), (False, 128, 1), (False, 128, 2), (True, 64, 1), (True, 128, 1)],
)
def test_prefill_of_sm121(is_int8: bool, head_dim: int, tactic: int, compiled: Compiled) -> None:
    sizes = {"is_int8": is_int8, "head_dim": head_dim, "tactic": tactic, "group": 3}
    step = GqaStep([(47, 9), (1, 8), (9, 0)], 9, sm="12.1", **sizes)
    check(step, compiled("12.1", ATTENTION).run(step)[0])


LINEAR_WEIGHTS = [("8", -1, 1), ("8", 128, 2), ("4", 128, 1), ("4", -1, 2), ("4z", 128, 1), ("4z", 32, 1)]


@pytest.mark.parametrize(("form", "group_size", "tactic"), LINEAR_WEIGHTS)
@pytest.mark.parametrize("sm", OWN_INSTRUCTIONS)
def test_few_tokens_of_a_projection(sm: str, form: str, group_size: int, tactic: int, compiled: Compiled) -> None:
    sizes = {"columns": 1152, "group_size": group_size, "tactic": tactic, "sm_count": 64}
    step = LinearStep(3, form=form, has_bias=True, sm=sm, **sizes)
    check(step, compiled(sm, LINEAR).run(step)[0])


@pytest.mark.parametrize(("form", "group_size", "tactic"), LINEAR_WEIGHTS)
def test_many_tokens_of_a_projection_of_sm121(form: str, group_size: int, tactic: int, compiled: Compiled) -> None:
    step = LinearStep(70, form=form, group_size=group_size, tactic=tactic, has_bias=True, sm="12.1")
    check(step, compiled("12.1", LINEAR).run(step)[0])
