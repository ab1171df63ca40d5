import dataclasses
import itertools

import pytest
import torch

from qwen_aot.errors import BuildError
from qwen_aot.plugins.launch import gqa_launches
from qwen_aot.plugins.variants import CACHES, HEAD_DIMS, SMS, TACTICS, select
from tests.pairs import identifier, swept
from tests.plugins.bounds import assert_close, assert_same_cache
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.gqa_cases import CACHE, SM, GqaStep

# Blocks: 128 queries, and 128 slots (head size 64) or 64 (head size 128) for prefill, or 64 of both; 128 or 64 slots
# for decode, in parts that are multiples of 128. Lengths sit on, before and after these edges; (n, 0) is an idle row.
PREFILL = {
    "dtype": ["fp16", "bf16"],
    "is_int8": [False, True],
    "head_dim": [64, 128],
    "group": [1, 2, 3, 5, 8],
    "rows": [
        (2, [(0, 2)]),
        (3, [(0, 1), (64, 3), (5, 0)]),
        (17, [(47, 17), (1, 16), (130, 1)]),
        (64, [(0, 64)]),
        (64, [(64, 63)]),
        (65, [(63, 65), (0, 64)]),
        (128, [(0, 128)]),
        (130, [(7, 130), (191, 129)]),
    ],
    "tactic": [1, 2],
}
DECODE = {
    "dtype": ["fp16", "bf16"],
    "is_int8": [False, True],
    "head_dim": [64, 128],
    "group": [1, 2, 3, 5, 7, 8, 16],
    "pasts": [[0], [1, -5, 62], [63], [64, 126], [127, 128], [255], [256, -300], [257, 511], [1023, 0, 700]],
    "sm_count": [1, 4, 64],  # one part a row, a few, many
    "tactic": [1, 2],
}


def check(step: GqaStep, device: torch.device) -> None:
    expected, actual = step.expected(), step.run(device)
    assert_close(actual["output"], expected["output"])
    for name in CACHE:
        cache, reference = actual[name], expected[name]
        if reference is None:
            continue
        # Nothing but this step's slots changed: NaN and untouched codes are compared too.
        assert_same_cache(cache.cpu(), reference, is_exact=device.type == "cpu" and not step.has_norms)


@pytest.mark.parametrize("case", swept(PREFILL), ids=identifier)
def test_prefill(case, device):
    steps, lengths = case["rows"]
    rest = {name: value for name, value in case.items() if name != "rows"}
    check(GqaStep(lengths=lengths, steps=steps, **rest), device)


@pytest.mark.parametrize("case", swept(DECODE), ids=identifier)
def test_decode(case, device):
    # A negative number is an idle row with that many tokens in its cache.
    lengths = [(abs(past), int(past >= 0)) for past in case["pasts"]]
    rest = {name: value for name, value in case.items() if name != "pasts"}
    check(GqaStep(lengths=lengths, steps=1, **rest), device)


# One token, a few, and more than a program has; 5 heads and 1 are fewer than it has, 20 are more.
NORMS = {
    "dtype": ["fp16", "bf16"],
    "is_int8": [False, True],
    "head_dim": [64, 128],
    "group": [3, 16],
    "rows": [(1, [(64, 1), (5, 0)]), (5, [(3, 5), (0, 2)])],
}


@pytest.mark.parametrize("case", swept(NORMS), ids=identifier)
def test_norms_of_heads(case, device):
    steps, lengths = case["rows"]
    rest = {name: value for name, value in case.items() if name != "rows"}
    check(GqaStep(lengths=lengths, steps=steps, has_norms=True, **rest), device)


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_each_norm_is_of_its_heads(name, device):
    """The check finds the two gains exchanged, and one that isn't there."""
    step = GqaStep(lengths=[(3, 2)], steps=2, group=2, has_norms=True)
    other = dataclasses.replace(step)
    other.tensors = step.tensors | {name: torch.ones(step.head_dim)}
    expected, actual = other.expected(), step.run(device)
    with pytest.raises(AssertionError):
        assert_close(actual["output"], expected["output"])


def tiles_of_other_sms() -> list[tuple[str, str, int, int]]:
    """(SM, cache, head size, tactic) for each tile of prefill that `SM` doesn't have: its edges lie elsewhere."""
    found: dict[tuple[str | int, ...], tuple[str, str, int, int]] = {}
    for sm in (SM, *SMS):
        for cache, head_dim, tactic in itertools.product(CACHES, HEAD_DIMS, TACTICS):
            facts = {"dtype": "fp16", "cache": cache, "head_dim": head_dim, "tactic": tactic}
            constants = select(sm, "gqa_prefill", **facts).constants
            tile = tuple(constants[name] for name in ("BLOCK_M", "BLOCK_N", "IS_HALVED"))
            found.setdefault((cache, head_dim, *tile), (sm, cache, head_dim, tactic))
    return [case for case in found.values() if case[0] != SM]


@pytest.mark.skipif(not IS_INTERPRETED, reason="another SM's tiles needn't fit this one")
@pytest.mark.parametrize(("sm", "cache", "head_dim", "tactic"), tiles_of_other_sms())
def test_prefill_with_tiles_of_other_sms(sm, cache, head_dim, tactic, device):
    lengths = [(62, 130), (0, 129), (65, 64), (7, 0)]
    sizes = {"head_dim": head_dim, "is_int8": cache == "int8", "num_kv_heads": 1}
    check(GqaStep(lengths=lengths, steps=130, sm=sm, tactic=tactic, **sizes), device)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(40, 8), (64, 8), (28, 4), (9, 3)])
@pytest.mark.parametrize("steps", [1, 4])
def test_head_counts_of_real_models(num_heads, num_kv_heads, steps, device):
    head_dim = 64 if num_heads == 9 else 128
    step = GqaStep(
        lengths=[(140, steps)],
        steps=steps,
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        sm_count=64,
    )
    check(step, device)


@pytest.mark.parametrize("steps", [1, 5])
def test_cache_that_is_full_to_its_last_slot(steps, device):
    check(GqaStep(lengths=[(131 - steps, steps), (3, steps)], steps=steps, capacity=131, group=2), device)


@pytest.mark.parametrize("steps", [1, 5])
def test_all_rows_idle(steps, device):
    check(GqaStep(lengths=[(3, 0), (60, 0)], steps=steps, group=2), device)


def test_chunks_and_decode_steps_fill_one_cache_as_one_prefill_does(device):
    whole = GqaStep(lengths=[(0, 70)], steps=70, group=2, seed=3)
    expected = whole.expected()
    key, value = (torch.full_like(whole.tensors[name], float("nan")) for name in ("key", "value"))
    outputs, past = [], 0
    for steps in (33, 1, 35, 1):
        step = GqaStep(lengths=[(past, steps)], steps=steps, group=2, capacity=whole.capacity)
        step.tensors |= {"qkv": whole.tensors["qkv"][:, past : past + steps].contiguous(), "key": key, "value": value}
        actual = step.run(device)
        outputs.append(actual["output"].cpu())
        key, value = actual["key"].cpu(), actual["value"].cpu()
        past += steps
    assert_close(torch.cat(outputs, dim=1), expected["output"])


def test_scale_is_of_the_scores(device):
    step = GqaStep(lengths=[(70, 1)], steps=1, group=2)
    step.scale = 1.0
    check(step, device)


def test_int8_scale_of_a_head_of_zeros_and_of_huge_values(device):
    step = GqaStep(lengths=[(0, 2)], steps=2, is_int8=True, dtype="bf16", num_kv_heads=1)
    step.tensors["qkv"][0, 0] = 0
    step.tensors["qkv"][0, 1, 64:128] = 1e7  # a scale beyond fp16 is held at its largest value
    check(step, device)


def test_a_request_that_nothing_serves_is_printed():
    step = GqaStep(lengths=[(0, 1)], steps=1, group=17)
    message = (
        f"no variant of gqa_decode for SM {SM} serves dtype=fp16, cache=same, head_dim=64, group=17; there are: .*g2_16"
    )
    with pytest.raises(BuildError, match=message):
        step.prepare(torch.device("cpu"))
    with pytest.raises(BuildError, match="head_dim=96"):
        select(SM, "gqa_prefill", dtype="fp16", cache="same", head_dim=96, group=1)


def test_fp32_is_refused():
    step = GqaStep(lengths=[(0, 1)], steps=1)
    tensors = {**step.tensors, "qkv": step.tensors["qkv"].float()}
    with pytest.raises(BuildError, match=r"fp16, bf16, not in torch\.float32"):
        gqa_launches(SM, 1, **tensors, output=tensors["qkv"], workspace={"query": None}, num_heads=2, scale=1.0)
