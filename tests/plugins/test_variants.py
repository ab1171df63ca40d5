import ast
import importlib.util
import itertools
from pathlib import Path

import pytest

from qwen_aot.errors import BuildError
from qwen_aot.plugins.signatures import KERNELS
from qwen_aot.plugins.variants import (
    FAMILIES,
    HEAD_DIMS,
    LINEAR_BLOCKS,
    LINEAR_ROW_MULTIPLE,
    MOE_BLOCKS_M,
    QUANT_BLOCK,
    SHARED_BYTES,
    SIZE_MULTIPLE,
    SMALL_BLOCKS,
    SMS,
    TACTICS,
    TILES,
    Variant,
    linear_tactics,
    select,
    variants,
)


@pytest.mark.parametrize("sm", SMS)
def test_few_variants_with_names_of_their_own(sm):
    listed = variants(sm)
    assert len({variant.name for variant in listed}) == len(listed) <= 126
    assert {variant.kernel for variant in listed} == set(KERNELS)


def test_each_family_has_tiles_and_a_limit():
    assert set(FAMILIES) == set(SMS)
    assert set(FAMILIES.values()) == set(TILES) == set(SHARED_BYTES)


def parameters(kernel: str) -> tuple[list[str], set[str]]:
    """Run-time and constexpr parameters of a kernel's source, without importing triton."""
    source = Path(importlib.util.find_spec(KERNELS[kernel].module).origin).read_text()
    (function,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == kernel]
    runtime = [argument.arg for argument in function.args.args if argument.annotation is None]
    return runtime, {argument.arg for argument in function.args.args} - set(runtime)


@pytest.mark.parametrize("variant", variants("8.0"), ids=lambda variant: variant.name)
def test_arguments_are_those_of_the_source(variant):
    runtime, constants = parameters(variant.kernel)
    assert [argument.name for argument in variant.arguments] == runtime
    assert set(variant.constants) == constants
    assert all("{" not in argument.type for argument in variant.arguments)


@pytest.mark.parametrize("sm", SMS)
def test_tiles_divide_what_the_kernels_leave_unmasked(sm):
    for variant in variants(sm):
        constants = variant.constants
        if "BLOCK_K" in constants:
            assert SIZE_MULTIPLE % constants["BLOCK_K"] == 0
            smallest = SMALL_BLOCKS[0] if variant.match.get("blocks") == "small" else QUANT_BLOCK
            assert smallest % constants["BLOCK_K"] == 0  # one scale a step
        if variant.kernel.startswith("linear") and variant.kernel != "linear_reduce":
            assert constants["BLOCK_N"] % LINEAR_ROW_MULTIPLE == 0
        if variant.kernel in ("moe_gate_up", "moe_down"):
            assert constants["BLOCK_M"] in MOE_BLOCKS_M
            other = {"moe_gate_up": "moe_down", "moe_down": "moe_gate_up"}[variant.kernel]
            both = select(sm, other, **{"has_zeros": 0, "tactic": TACTICS[0], **variant.match})
            assert both.constants["BLOCK_M"] == constants["BLOCK_M"]  # what `moe_scatter` made serves both
        if variant.kernel == "gqa_decode":
            assert 128 % constants["BLOCK_N"] == 0  # parts start at multiples of 128


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_group_has_one_decode_variant(sm, dtype, cache, head_dim):
    for group in range(1, 17):
        request = {"dtype": dtype, "cache": cache, "head_dim": head_dim, "group": group}
        serving = [variant for variant in variants(sm) if variant.kernel == "gqa_decode" and variant.serves(request)]
        assert len(serving) == 1 and serving[0].constants["GROUP"] >= group
        assert select(sm, "gqa_decode", **request) == serving[0]


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kernel", ["linear_decode", "linear_prefill"])
def test_every_tactic_of_a_projection_has_one_variant_on_every_sm(sm, dtype, kernel):
    """So that a tactic that was timed on one GPU exists on another."""
    for bits, has_zeros, blocks in itertools.product((8, 4), (0, 1), LINEAR_BLOCKS):
        if bits == 8 and (has_zeros or blocks == "small"):
            continue  # such codes aren't served
        found = []
        for tactic in TACTICS:
            request = {"dtype": dtype, "weight_bits": bits, "has_zeros": has_zeros, "blocks": blocks, "tactic": tactic}
            serving = [variant for variant in variants(sm) if variant.kernel == kernel and variant.serves(request)]
            assert len(serving) == 1
            assert serving[0].constants["HAS_ZEROS"] >= has_zeros
            found.append(serving[0])
        assert len(set(map(lambda variant: variant.name, found))) == linear_tactics(bits, blocks, bool(has_zeros))


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kernel", ["moe_gate_up", "moe_down", "moe_decode_gate_up", "moe_decode_down"])
def test_every_tactic_of_experts_has_one_variant_on_every_sm(sm, dtype, kernel):
    for bits, has_zeros in ((16, 0), (8, 0), (4, 0), (4, 1)):
        found = set()
        for tactic in TACTICS:
            request = {"dtype": dtype, "weight_bits": bits, "has_zeros": has_zeros, "tactic": tactic}
            (serving,) = (variant for variant in variants(sm) if variant.kernel == kernel and variant.serves(request))
            found.add((serving.constants["BLOCK_M"], serving.num_stages))
        assert len(found) == (1 if "decode" in kernel and has_zeros else len(TACTICS))


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_tactic_of_prefill_has_one_variant_on_every_sm(sm, cache, head_dim):
    """Those over an int8 cache share it."""
    found = set()
    for tactic in TACTICS:
        request = {"dtype": "bf16", "cache": cache, "head_dim": head_dim, "tactic": tactic}
        (serving,) = (v for v in variants(sm) if v.kernel == "gqa_prefill" and v.serves(request))
        found.add(serving.constants["BLOCK_M"])
    assert len(found) == (1 if cache == "int8" else len(TACTICS))


def test_grid_rounds_up():
    variant = Variant("gqa_prefill", {}, {"BLOCK_M": 64}, {}, num_warps=4)
    assert variant.grid({"B": 3, "S": 65, "H": 5}) == (2, 5, 3)


def test_unknown_sm_and_request():
    with pytest.raises(BuildError, match=r"no kernels for SM 7\.5; there are for 8\.0, 8\.6"):
        select("7.5", "gqa_reduce", dtype="fp16")
    with pytest.raises(
        BuildError, match=r"no variant of moe_sum for SM 9\.0 serves dtype=fp32; there are: moe_sum-fp16"
    ):
        select("9.0", "moe_sum", dtype="fp32")
    with pytest.raises(BuildError, match="serves dtype=fp16, head_dim=64"):  # a fact is missing
        select("9.0", "gqa_decode", dtype="fp16", head_dim=64)
