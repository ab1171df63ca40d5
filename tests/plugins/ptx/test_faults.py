"""Faults seeded into the PTX of compiled kernels, each of which is noticed: by a wrong result, or as what it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.device import check
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep
from tests.plugins.ptx.interpreter import Interpreter, PtxError
from tests.plugins.ptx.steps import CompiledSteps

if not IS_INTERPRETED:
    pytest.skip("PTX is executed on the CPU only", allow_module_level=True)

SM = "8.9"  # of the library that is built anyway

PREFILL, PREFILL_INT8 = "gqa_prefill-fp16-same-d64-t1", "gqa_prefill-fp16-int8-d64"
DECODE, DECODE_ONE = "gqa_decode-fp16-same-d64-g2_16", "gqa_decode-fp16-same-d64-g1_1"
REDUCE, ROTATE_INT8 = "gqa_reduce-fp16-d64_128", "gqa_rotate-fp16-int8-d64_128"
ROTATE = "gqa_rotate-fp16-same-d64_128"
GATE_UP, GATE_UP_INT4, DOWN_INT4 = "moe_gate_up-fp16-w16-t1", "moe_gate_up-fp16-w4-z1-t1", "moe_down-fp16-w4-z1-t1"
HALVED, BLOCKS_OF_32 = "gqa_prefill-fp16-same-d128-t2", "moe_down-fp16-w4-z0-t2"
TIMED_LENGTHS, TIMED_IDS = "gqa_timed_lengths", "moe_timed_ids"
FEW_INT8 = "moe_decode_gate_up-fp16-w8-t1"
SCATTER = "moe_scatter"
LINEAR_FEW, LINEAR_MANY = "linear_decode-fp16-w4-z0-large-t1", "linear_prefill-fp16-w8-large-t1"
LINEAR_ZEROS, LINEAR_REDUCE = "linear_decode-fp16-w4-small", "linear_reduce-fp16"

# Rows of several blocks, of which some are full: then no instruction works on nothing alone.
STEPS = {
    PREFILL: GqaStep(lengths=[(47, 9), (130, 150)], steps=150, num_kv_heads=1),
    PREFILL_INT8: GqaStep(lengths=[(47, 9), (130, 150)], steps=150, num_kv_heads=1, is_int8=True),
    HALVED: GqaStep(lengths=[(47, 9), (3, 70)], steps=70, num_kv_heads=1, head_dim=128, tactic=2),
    TIMED_LENGTHS: GqaStep(lengths=[(2**40, 1), (2**40, 0)], steps=1, capacity=1200, is_timed=True),
    DECODE: GqaStep(lengths=[(700, 1), (5, 1), (63, 0)], steps=1, num_kv_heads=1, group=3, sm_count=64),
    DECODE_ONE: GqaStep(lengths=[(700, 1), (5, 1), (63, 0)], steps=1, num_kv_heads=1, sm_count=64),
    REDUCE: GqaStep(lengths=[(700, 1), (5, 1)], steps=1, num_kv_heads=1, group=3, sm_count=64),
    ROTATE: GqaStep(lengths=[(47, 9), (3, 2)], steps=9, num_kv_heads=1, group=2, has_norms=True),
    ROTATE_INT8: GqaStep(lengths=[(47, 9), (3, 2)], steps=9, num_kv_heads=1, group=2, is_int8=True),
    GATE_UP: MoeStep(num_tokens=80, num_experts=1, k=1, hidden_size=256),
    GATE_UP_INT4: MoeStep(num_tokens=80, num_experts=1, k=1, hidden_size=256, form="4z"),
    DOWN_INT4: MoeStep(num_tokens=80, num_experts=1, k=1, inner_size=256, form="4z"),
    BLOCKS_OF_32: MoeStep(num_tokens=80, num_experts=1, k=1, inner_size=256, form="4", tactic=2),
    TIMED_IDS: MoeStep(3, k=3, expert_ids=torch.tensor([[4, 1, 3], [0, 2, 2], [0, 5, 1]]).int(), is_timed=True),
    FEW_INT8: MoeStep(num_tokens=5, num_experts=3, hidden_size=512, form="8"),
    SCATTER: MoeStep(num_tokens=300, num_experts=40),
    LINEAR_FEW: LinearStep(num_tokens=5, rows=80, columns=640, has_bias=True, sm=SM),
    LINEAR_MANY: LinearStep(num_tokens=70, rows=80, columns=384, form="8", sm=SM),
    LINEAR_ZEROS: LinearStep(num_tokens=5, rows=144, columns=384, form="4z", group_size=32, sm=SM),
    LINEAR_REDUCE: LinearStep(num_tokens=5, rows=80, columns=2048, sm_count=64, has_bias=True, sm=SM),
}

MMA = r"(mma\.sync\S+ \{[^}]*\}), \{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}, \{ (%r\d+), (%r\d+) \}"
WRONG = r"off by [\d.]+ units|elements were not written|Tensor-likes are not"
RACE = "a race: "
STRAY = "lies in no allocation|of an allocation of"
ODD = (  # a predicate that holds for every other thread
    "\t.reg .pred odd;\n\t.reg .b32 odd_bit;\n\tmov.u32 odd_bit, %tid.x;\n\tand.b32 odd_bit, odd_bit, 1;\n"
    "\tsetp.ne.b32 odd, odd_bit, 0;\n"
)
IN_FLIGHT = "what an asynchronous copy hasn't brought yet"


@dataclass(frozen=True)
class Fault:
    """In a variant's PTX, the nth match of a pattern becomes something else, and then `said` is.

    Attributes:
        nth: Counted from 0; from the end where it is negative.
    """

    variant: str
    pattern: str
    replacement: str
    said: str
    nth: int = 0

    def edit(self, text: str) -> str:
        found = list(re.finditer(self.pattern, text))[self.nth]
        changed = text[: found.start()] + found.expand(self.replacement) + text[found.end() :]
        assert changed != text
        return changed


FAULTS = {
    "a transposition missing": Fault(PREFILL, r"x4\.trans", "x4", WRONG),
    "a transposition too many": Fault(PREFILL, r"x4\.shared", "x4.trans.shared", WRONG),
    "rows of another matrix": Fault(PREFILL, r"(trans\S+ \{)(%r\d+), (%r\d+)", r"\1\3, \2", WRONG),
    "the next row": Fault(PREFILL, r"(trans\S+ \{.*\}), \[(%r\d+)\]", r"\1, [\2+128]", WRONG),
    "a row that isn't aligned": Fault(
        PREFILL, r"(trans\S+ \{.*\}), \[(%r\d+)\]", r"\1, [\2+2]", "isn't a multiple of 16"
    ),
    "A's quarters in another order": Fault(PREFILL, MMA, r"\1, { \2, \4, \3, \5 }, { \6, \7 }", WRONG),
    "B's halves exchanged": Fault(PREFILL, MMA, r"\1, { \2, \3, \4, \5 }, { \7, \6 }", WRONG),
    "A's quarters in another order, of experts": Fault(GATE_UP, MMA, r"\1, { \2, \4, \3, \5 }, { \6, \7 }", WRONG),
    "bf16 for fp16": Fault(DECODE, r"f32\.f16\.f16\.f32", "f32.bf16.bf16.f32", WRONG),
    "the halves of a pair exchanged": Fault(PREFILL, r"(f16x2\.f32 \t%r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2", WRONG),
    "the mask of causality off by one": Fault(PREFILL, r"setp\.le\.s32", "setp.lt.s32", WRONG),
    "a scale that isn't subtracted": Fault(PREFILL, r"sub\.f32", "add.f32", WRONG),
    "another neighbour": Fault(DECODE, r"(bfly\S+ \t%r\d+, %r\d+), 1,", r"\1, 2,", f"{WRONG}|{RACE}"),
    "a load's guard dropped": Fault(PREFILL, r"@%p\d+ (ld\.global\.v4)", r"\1", f"{WRONG}|{STRAY}", -1),
    "a store's guard dropped": Fault(PREFILL, r"@%p\d+ (st\.global\.v4)", r"\1", f"{WRONG}|{STRAY}", -1),
    "a store's guard inverted": Fault(DECODE, r"@(%p\d+ st\.global)", r"@!\1", f"{WRONG}|{STRAY}", -1),
    "a copy's length always whole": Fault(DECODE, r"16, 0, %p\d+", "16, 16, %p1", f"{WRONG}|{STRAY}"),
    "a copy's length never whole": Fault(DECODE, r"16, 0, %p\d+", "8, 0, %p1", WRONG),
    "a copy from further on": Fault(DECODE, r"(\], \[ %rd\d+) \+ 0 \], 0x10", r"\1 + 16 ], 0x10", WRONG, 1),
    "a copy to further on": Fault(
        DECODE, r"(shared\.global \[ %r\d+) \+ 0", r"\1 + 16", f"{WRONG}|{RACE}|nobody wrote"
    ),
    "a store to further on": Fault(GATE_UP, r"(st\.global\S* \[ %rd\d+) \+ 0", r"\1 + 16", f"{WRONG}|{STRAY}|{RACE}"),
    "a store that isn't aligned": Fault(GATE_UP, r"(st\.global\S* \[ %rd\d+) \+ 0", r"\1 + 2", "isn't a multiple of"),
    "a load from further on": Fault(ROTATE_INT8, r"(ld\.global\.v4\S* \{.*\}, \[ %rd\d+) \+ 0", r"\1 + 16", WRONG),
    "another root of a head's norm": Fault(ROTATE, r"sqrt\.approx\.ftz\.f32", "ex2.approx.ftz.f32", WRONG),
    "a wait missing": Fault(PREFILL, r"\tcp\.async\.wait_group.*\n", "", IN_FLIGHT),
    "a wait missing, of decode": Fault(DECODE, r"\tcp\.async\.wait_group.*\n", "", IN_FLIGHT),
    "a wait missing, of experts": Fault(GATE_UP_INT4, r"\tcp\.async\.wait_group.*\n", "", IN_FLIGHT),
    "a wait for too few": Fault(GATE_UP, r"(cp\.async\.wait_group \t)2", r"\g<1>3", IN_FLIGHT),
    "a group that isn't committed": Fault(GATE_UP, r"\tcp\.async\.commit_group;\n", "", IN_FLIGHT, -1),
    "a barrier missing behind a wait": Fault(PREFILL, r"(wait_group.*\n)\tbar\.sync.*\n", r"\1", RACE),
    "a barrier missing before a copy": Fault(GATE_UP, r"\tbar\.sync.*\n", "", RACE, 1),
    "a barrier in a branch": Fault(
        DECODE, r"\tbar\.sync", f"{ODD}\t@odd bar.sync", "only some of a warp's threads get here"
    ),
    "a matrix in a branch": Fault(
        PREFILL, r"\tldmatrix", f"{ODD}\t@odd ldmatrix", "only some of a warp's threads get here"
    ),
    "an int4 code's mask": Fault(GATE_UP_INT4, "0xf0f0f0f0", "0x70f0f0f0", WRONG),
    "another weight of high nibbles": Fault(DOWN_INT4, "0x2c002c00", "0x2c002800", WRONG),
    "a byte of another place": Fault(DOWN_INT4, r"(prmt\.b32 pair, low, 0x64), 0x4342", r"\1, 0x4243", WRONG),
    "a scale that isn't used": Fault(
        DOWN_INT4, r"fma\.rn\.f32 \t(%r\d+), %r\d+, (%r\d+)", r"fma.rn.f32 \t\1, 0f3F800000, \2", WRONG
    ),
    "the other half of values, not stored": Fault(HALVED, r"\t@%p\d+ st\.global\.v4.*\n", "", WRONG, -1),
    "the next row of a half": Fault(HALVED, r"(trans\S+ \{.*\}), \[(%r\d+)\]", r"\1, [\2+128]", WRONG),
    "an int4 code's mask, in blocks of 32": Fault(BLOCKS_OF_32, "0xf0f0f0f0", "0x70f0f0f0", WRONG),
    "another length than is timed": Fault(TIMED_LENGTHS, r"(@%p9 st\S+ \[.*\], \{ )%rd10", r"\1%rd1", WRONG),
    "lengths of more rows": Fault(TIMED_LENGTHS, r"@%p10 ", "", STRAY),
    "an id that isn't an expert's": Fault(TIMED_IDS, r"setp\.lt\.s32 (\t%p3)", r"setp.ge.s32 \1", f"{WRONG}|{STRAY}"),
    "an id that comes twice": Fault(TIMED_IDS, r"setp\.ne\.b32 (\t%p6)", r"setp.eq.b32 \1", WRONG),
    "another expert in turn": Fault(TIMED_IDS, r"rem\.s32", "sub.s32", f"{WRONG}|{STRAY}"),
    "another rounding of codes": Fault(ROTATE_INT8, r"(add\.f32 \t%r\d+, %r\d+), 0fCB400000", r"\1, 0fCB400001", WRONG),
    "a part that isn't counted": Fault(REDUCE, r"setp\.lt\.s32", "setp.gt.s32", WRONG, 2),
    "a sum that lacks a neighbour's": Fault(
        SCATTER, r"(shfl\.sync\.up\S+ \t%r\d+, %r\d+), 1,", r"\1, 2,", f"{WRONG}|{STRAY}|{RACE}"
    ),
    "another block of K": Fault(LINEAR_ZEROS, r"shr\.s32 (\t%r\d+), (%r\d+), %r\d+", r"shr.s32 \1, \2, 30", WRONG, -1),
    "a bias that isn't added": Fault(LINEAR_FEW, r"cvt\.f32\.f16 (\t?%r\d+), %rs\d+", r"mov.b32 \1, 0", WRONG, -1),
    "a projection's byte of another place": Fault(
        LINEAR_FEW, r"(prmt\.b32 pair, low, 0x64), 0x4342", r"\1, 0x4243", WRONG
    ),
    "a projection's scale that isn't used": Fault(
        LINEAR_MANY, r"fma\.rn\.f32 \t(%r\d+), %r\d+, (%r\d+)", r"fma.rn.f32 \t\1, 0f3F800000, \2", WRONG
    ),
    "a wait missing, of a projection": Fault(LINEAR_FEW, r"\tcp\.async\.wait_group.*\n", "", IN_FLIGHT),
    "a part that isn't added": Fault(
        LINEAR_REDUCE, r"add\.f32 \t(%r\d+), (%r\d+), (%r\d+)", r"mov.b32 \t\1, \2", WRONG
    ),
    "a form that isn't known": Fault(
        DECODE, r"ex2\.approx\.ftz\.f32", "ex2.approx.ftz.f16", r"know: ex2\.approx\.ftz\.f16 at line"
    ),
}


@pytest.fixture(scope="module")
def compiled(plugin_build: Path, interpreter: Interpreter) -> CompiledSteps:
    return CompiledSteps(interpreter, plugin_build / "build" / "kernels" / f"sm_{SM.replace('.', '')}")


def execute(compiled: CompiledSteps, variant: str, text: str) -> None:
    """A step with this text for its variant.

    Raises:
        PtxError: What the kernel may not do.
        AssertionError: The result is wrong.
    """
    tensors, counts = compiled.run(STEPS[variant], {variant: text})
    assert counts[variant].executed() > 0
    check(STEPS[variant], tensors)


@pytest.mark.parametrize("variant", STEPS)
def test_without_a_fault(variant: str, compiled: CompiledSteps) -> None:
    execute(compiled, variant, compiled.text(variant))


@pytest.mark.parametrize("name", FAULTS)
def test_noticed(name: str, compiled: CompiledSteps) -> None:
    fault = FAULTS[name]
    with pytest.raises((PtxError, AssertionError), match=f"(?s){fault.said}"):
        execute(compiled, fault.variant, fault.edit(compiled.text(fault.variant)))


# Kernels in which each barrier orders something that these steps do; none of them may be missed.
EVERY_BARRIER = (DECODE, PREFILL_INT8, GATE_UP, GATE_UP_INT4, DOWN_INT4, FEW_INT8, SCATTER, LINEAR_MANY)


@pytest.mark.parametrize("variant", EVERY_BARRIER)
def test_no_barrier_can_be_missed(variant: str, compiled: CompiledSteps) -> None:
    text = compiled.text(variant)
    barriers = list(re.finditer(r"\tbar\.sync.*\n", text))
    assert barriers
    for barrier in barriers:
        with pytest.raises(PtxError, match=f"{RACE}|writes where an asynchronous copy will"):
            execute(compiled, variant, text[: barrier.start()] + text[barrier.end() :])
