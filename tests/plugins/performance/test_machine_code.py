"""What the kernels' main loops may take, held against what was recorded of every SM.

`test_tables.py` compares the record with new compilations: SM 8.9 always, the others in `.ci/deep`.
"""

import fnmatch
import json
from collections.abc import Callable

import pytest

from qwen_aot.plugins.performance.machine_code import MainLoop, main_loop
from qwen_aot.plugins.performance.resources import LOOPING, Resources, measured_one, recorded
from qwen_aot.plugins.variants import SMS, variants

MMA = ("8.0", "8.6", "8.7", "8.9", "12.0", "12.1")  # tensor cores that a warp uses by itself
WARPGROUP = ("9.0",)
TENSOR_MEMORY = ("10.0", "11.0")


def listing(lines: list[str]) -> str:
    """Machine code as `cuobjdump` prints it; {0} is the address of the first line."""
    text = "\n".join(f"        /*{16 * at:04x}*/    {line} ;" for at, line in enumerate(lines))
    return text.format(*(f"0x{16 * at:04x}" for at in range(len(lines))))


# A loop with a product that masks, one with a product that doesn't, and one that is longer, without a product.
LOOPS = [
    *("MOV R1, R2", "HMMA.16816.F32 R2, R4", "FSEL R3, R4", "@P0 BRA {0}"),
    *("HMMA.16816.F32 R2, R4", "@!P1 LDGSTS.E.BYPASS.128 [R1], [R2.64]", "BRA `(.L_x) {4}"),
    *["LDG.E.U16 R5, [R2.64]", "@P2 SHFL.BFLY PT, R1, R2", "BAR.SYNC.DEFER_BLOCKING 0x0", "BAR.ARV 0x1, 0x40"],
    *("LDG.E R5, [R2.64]", "LDG.E.64 R6, [R2.64]", "BAR.RED.OR.DEFER_BLOCKING 0x0", "@!P1 BRA {7}", "BRA {16}"),
    "HMMA.16816.F32 R2, R4",
]


def test_the_main_loop_is_the_shortest_of_those_with_most_products():
    assert main_loop(listing(LOOPS)) == MainLoop(3, 1, 0, 0, {16: 1})


def test_without_products_it_is_the_longest():
    plain = [line.replace("HMMA", "FFMA") for line in LOOPS]
    assert main_loop(listing(plain)) == MainLoop(8, 0, 1, 2, {2: 1, 4: 1, 8: 1})


@pytest.mark.parametrize("lines", [[], ["EXIT"], ["HMMA.16816.F32 R2, R4", "BRA {2}", "EXIT"], ["BRA {0}"]])
def test_no_loop_where_no_branch_goes_back(lines):
    """A branch to itself, as behind the end of each kernel, has nothing to execute."""
    assert main_loop(listing(lines)) == MainLoop()


def test_another_branch_is_another_loop():
    """The loop is found by where its branch goes, not by what stands around it."""
    moved = [line.replace("{4}", "{0}") for line in LOOPS]
    assert main_loop(listing(moved)) == MainLoop(7, 2, 0, 0, {16: 1})


def test_a_branch_back_from_behind_the_end_is_no_loop():
    """It would span all loops before it, and have most products."""
    behind = [*LOOPS, "EXIT", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2", "@!P0 BRA {17}", "BRA {0}"]
    assert main_loop(listing(behind)) == main_loop(listing(LOOPS))
    assert main_loop(listing([line.replace("EXIT", "NOP") for line in behind])).products == 3


def per_product(used: Resources) -> float:
    return used.loop.instructions / used.loop.products


def narrow_loads(used: Resources) -> float:
    """Loads of less than 16 bytes."""
    return sum(count for width, count in used.loop.loads.items() if width < 16)


def loads_of_bytes(used: Resources) -> float:
    """Loads of less than 4 bytes."""
    return sum(count for width, count in used.loop.loads.items() if width < 4)


def instructions(used: Resources) -> float:
    return used.loop.instructions


def barriers(used: Resources) -> float:
    return used.loop.barriers


def shuffles(used: Resources) -> float:
    return used.loop.shuffles


# (SMs, variants, what is counted, at most)
BOUNDS: list[tuple[tuple[str, ...], str, Callable[[Resources], float], float]] = [
    (MMA, "gqa_prefill-*-same-d128-t?", per_product, 4.5),
    (MMA, "gqa_prefill-*-same-d64-t1", per_product, 5.2),
    (MMA, "gqa_prefill-*-same-d64-t2", per_product, 5.9),  # half of the slots a step share what else is to do
    (MMA, "gqa_prefill-*-same-*", barriers, 3),
    (MMA, "gqa_prefill-*-same-*", shuffles, 8),
    (SMS, "gqa_prefill-*-same-*", narrow_loads, 0),
    (SMS, "gqa_decode-*-same-*", narrow_loads, 0),
    (SMS, "moe_*-w16-t?", narrow_loads, 0),
    (SMS, "moe_*-w8-t?", narrow_loads, 0),
    (SMS, "moe_decode_*-w4-z*", instructions, 370),
    (SMS, "moe_decode_*-w4-z0-t?", narrow_loads, 1),  # a scale
    (SMS, "moe_decode_*-w4-z1", narrow_loads, 2),  # and a zero
    (SMS, "linear_decode-*-w4-z0-large-t?", instructions, 450),
    (SMS, "linear_decode-*-w4-z1-large", instructions, 480),
    (SMS, "linear_decode-*-w4-small", instructions, 235),
    (SMS, "linear_decode-*-w8-large-t1", instructions, 450),
    (SMS, "linear_decode-*-w8-large-t2", instructions, 700),
    (SMS, "linear_decode-*", barriers, 2),
    (SMS, "linear_*-w4-z0-large-t?", loads_of_bytes, 0),
    (SMS, "linear_*-w8-large-t?", loads_of_bytes, 1),  # a scale
    (SMS, "linear_*-w4-z1-large", loads_of_bytes, 8),  # zeros
    (SMS, "linear_*-w4-small", loads_of_bytes, 8),
    (MMA, "linear_prefill-*-large*", per_product, 16),
    (MMA, "linear_prefill-*-w4-z0-large-t2", per_product, 9),
    (MMA, "linear_prefill-*-w8-large-t2", per_product, 10.2),
    (MMA, "linear_prefill-*", barriers, 2),
    (WARPGROUP, "linear_prefill-*", barriers, 4),
    (TENSOR_MEMORY, "linear_prefill-*-w8-*", barriers, 4),
    (TENSOR_MEMORY, "linear_prefill-*-w4-*", barriers, 7),  # two products, each through tensor memory
    *(
        row
        for kernel in ("moe_gate_up", "moe_down")
        for row in (
            (SMS, f"{kernel}-*-z1-t2", barriers, 4),  # products of a warp's own, on every SM
            *((SMS, f"{kernel}-*-{form}-t2", barriers, 2) for form in ("w16", "w8", "w4-z0")),
            (SMS, f"{kernel}-*-w4-z1-t2", instructions, 290),
            (SMS, f"{kernel}-*-w4-z1-t2", narrow_loads, 2),
            (SMS, f"{kernel}-*-w16-t2", per_product, 4),
            (SMS, f"{kernel}-*-w4-z0-t2", instructions, 270),
            (MMA, f"{kernel}-*-w4-z0-t1", instructions, 270),
            (SMS, f"{kernel}-*-w4-z0-t2", narrow_loads, 1),
            (WARPGROUP + TENSOR_MEMORY, f"{kernel}-*-w4-z0-t1", narrow_loads, 1),
            (WARPGROUP + TENSOR_MEMORY, f"{kernel}-*-w4-z1-t1", narrow_loads, 2),
            (WARPGROUP, f"{kernel}-*-w4-z0-t1", barriers, 4),
            (WARPGROUP, f"{kernel}-*-w4-z1-t1", barriers, 6),  # zeros reach the threads that convert by shared memory
            (TENSOR_MEMORY, f"{kernel}-*-w4-z0-t1", barriers, 5),  # one more for tensor memory
            (TENSOR_MEMORY, f"{kernel}-*-w4-z1-t1", barriers, 7),
        )
    ),
]


def excesses(sm: str, listed: dict[str, Resources]) -> list[str]:
    """What of some variants is over its bound."""
    found = [f"{name} spills {used.spill_bytes} bytes" for name, used in listed.items() if used.spill_bytes]
    for sms, pattern, counted, most in BOUNDS:
        for name, used in listed.items():
            if sm in sms and fnmatch.fnmatch(name, pattern):
                value = counted(used)
                if value > most:
                    found.append(f"{name}: {counted.__name__} {value:.4g}, at most {most}")
    return found


def looping(sm: str) -> dict[str, Resources]:
    kernels = {variant.name: variant.kernel for variant in variants(sm)}
    return {name: used for name, used in recorded()[sm].items() if kernels[name] in LOOPING}


@pytest.mark.parametrize("sm", SMS)
def test_bounds(sm):
    assert excesses(sm, looping(sm)) == []


def test_bounds_of_bf16(plugin_build):
    """What isn't recorded, of the SM whose kernels are compiled anyway."""
    folder = plugin_build / "build" / "kernels" / "sm_89"
    used = {}
    for variant in variants("8.9"):
        if variant.kernel in LOOPING and variant.match["dtype"] == "bf16":
            entry = json.loads((folder / f"{variant.name}.json").read_bytes())
            used[variant.name] = measured_one(folder / entry["file"], variant, entry)
    assert len(used) == len(looping("8.9"))
    assert excesses("8.9", used) == []


def test_each_bound_is_of_something():
    for sms, pattern, counted, _ in BOUNDS:
        for sm in sms:
            assert fnmatch.filter(looping(sm), pattern), (sm, pattern, counted.__name__)


def test_what_is_over_a_bound_is_found():
    """The kernels as they were: 64 queries and four warps, and codes converted one by one."""
    before = {
        "gqa_prefill-fp16-same-d128-t2": Resources(185, 36864, 0, MainLoop(484, 64, 64, 11, {16: 8})),
        "moe_decode_gate_up-fp16-w4-z0-t1": Resources(
            190, 16640, 8, MainLoop(734, 32, 0, 6, {1: 1, 2: 1, 8: 8, 16: 4})
        ),
    }
    assert excesses("8.9", before) == [
        "moe_decode_gate_up-fp16-w4-z0-t1 spills 8 bytes",
        "gqa_prefill-fp16-same-d128-t2: per_product 7.562, at most 4.5",
        "gqa_prefill-fp16-same-d128-t2: barriers 11, at most 3",
        "gqa_prefill-fp16-same-d128-t2: shuffles 64, at most 8",
        "moe_decode_gate_up-fp16-w4-z0-t1: instructions 734, at most 370",
        "moe_decode_gate_up-fp16-w4-z0-t1: narrow_loads 10, at most 1",
    ]


@pytest.mark.parametrize("sm", MMA)
def test_the_loop_that_was_found_has_the_products_of_a_step(sm):
    """As many instructions of 16 · 8 · 16 as the tiles make: neither a part of the loop, nor more than it."""
    listed = looping(sm)
    for variant in variants(sm):
        constants, used = variant.constants, listed.get(variant.name)
        if used is None or constants.get("GROUP") == 1:
            continue
        if variant.kernel.startswith("gqa"):
            rows = constants["BLOCK_M"] if variant.kernel == "gqa_prefill" else constants["GROUP"]
            size = 2 * rows * constants["BLOCK_N"] * constants["D"]
        else:
            matrices = 2 if variant.kernel.endswith("gate_up") else 1
            size = matrices * constants["BLOCK_M"] * constants["BLOCK_N"] * constants["BLOCK_K"]
        assert used.loop.products * variant.num_warps == size // (16 * 8 * 16), variant.name
