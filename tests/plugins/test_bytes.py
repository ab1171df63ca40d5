"""What the kernels read and write, counted while the interpreter runs them: no more than they must."""

from collections import Counter

import pytest
import torch

from tests.pairs import identifier, swept
from tests.plugins.any_step import Step
from tests.plugins.bounds import assert_close
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep

if not IS_INTERPRETED:
    pytest.skip("bytes are counted in Triton's interpreter only", allow_module_level=True)

from tests.plugins.interpreter import Traffic, counting

CPU = torch.device("cpu")
ALLOWED = 1.05  # times what must be read
DECODE = {
    "group": [1, 3, 8, 16],
    "is_int8": [False, True],
    "head_dim": [64, 128],
    "lengths": [(512,), (513, 1500, 0), (2048,)],
}


def count(step: Step) -> list[Traffic]:
    """The traffic of each launch."""
    tensors, launches = step.prepare(CPU)
    result = []
    for launch in launches:
        with counting({name: tensor for name, tensor in tensors.items() if tensor is not None}) as traffic:
            launch.run()
        result.append(traffic)
    return result


def total(traffic: list[Traffic]) -> Traffic:
    return Traffic(sum((part.read for part in traffic), Counter()), sum((part.written for part in traffic), Counter()))


@pytest.mark.parametrize("case", swept(DECODE), ids=identifier)
def test_decode_attention_reads_each_valid_key_and_value_once(case):
    lengths = case["lengths"]
    step = GqaStep(
        lengths=[(length - 1, 1) if length else (700, 0) for length in lengths],
        steps=1,
        group=case["group"],
        num_kv_heads=2,
        is_int8=case["is_int8"],
        head_dim=case["head_dim"],
        capacity=4096,
        sm_count=64,
    )
    rotate, *attention = count(step)
    traffic = total(attention)
    valid = sum(lengths) * 2  # (slot, head) pairs
    head_dim, element = case["head_dim"], 1 if case["is_int8"] else 2
    assert traffic.read["key"] == traffic.read["value"] == valid * head_dim * element
    assert traffic.read["key_scale"] == traffic.read["value_scale"] == (valid * 2 if case["is_int8"] else 0)
    cache = sum(traffic.read[name] for name in ("key", "value", "key_scale", "value_scale"))
    assert sum(traffic.read.values()) <= ALLOWED * cache  # with q, lengths and the parts' results, of both kernels
    # What is written of the cache: one slot of each row and head that isn't idle.
    assert rotate.written["key"] == sum(length > 0 for length in lengths) * 2 * head_dim * element


def test_prefill_reads_nothing_beyond_what_a_tile_of_queries_sees():
    traffic = total(count(GqaStep(lengths=[(200, 100), (0, 40), (90, 0)], steps=128, group=2, capacity=1000)))
    # One tile of 128 queries a row and query head: all of the row's slots once for each of 4 heads.
    assert traffic.read["key"] == traffic.read["value"] == (300 + 40) * 4 * 64 * 2


@pytest.mark.parametrize("form", ["16", "8", "4", "4z"])
@pytest.mark.parametrize(("num_tokens", "routing"), [(1, "random"), (5, "random"), (16, "same")])
def test_decode_experts_read_each_chosen_expert_once(form, num_tokens, routing):
    hidden_size, inner_size = 512, 256
    step = MoeStep(
        num_tokens=num_tokens,
        num_experts=12,
        k=2,
        hidden_size=hidden_size,
        inner_size=inner_size,
        form=form,
        routing=routing,
    )
    traffic = total(count(step))
    bits, numbers = int(form[0:2].rstrip("z")), 3 * hidden_size * inner_size
    scales = {16: 0, 8: (2 * inner_size + hidden_size) * 2, 4: numbers // 128 * 2}[bits]
    zeros = numbers // 128 if form == "4z" else 0
    expected = step.num_chosen * (numbers * bits // 8 + scales + zeros)
    weights = sum(count for name, count in traffic.read.items() if name.startswith(("gate_up", "down")))
    assert weights == expected
    if num_tokens == 1 and bits == 16:  # with activations; those are read from cache, once a program
        assert sum(traffic.read.values()) <= ALLOWED * expected
    assert traffic.written["output"] == num_tokens * hidden_size * 2


@pytest.mark.parametrize(("form", "group_size"), [("8", -1), ("8", 128), ("4", 32), ("4", 128), ("4z", 64), ("4z", -1)])
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_decode_of_a_projection_reads_each_weight_once(form, group_size, num_tokens):
    rows, columns = 208, 2048
    step = LinearStep(num_tokens=num_tokens, rows=rows, columns=columns, form=form, group_size=group_size, sm_count=64)
    assert step.splits > 1
    traffic = total(count(step))
    bits = int(form[0])
    assert traffic.read["codes"] == rows * columns * bits // 8
    assert traffic.written["output"] == num_tokens * rows * 2


@pytest.mark.parametrize(
    ("form", "group_size", "bits_of_scale"),
    [("8", -1, 16), ("8", 128, 16), ("4", 32, 16), ("4", 128, 16), ("4z", 32, 20), ("4z", 128, 20)],
)
def test_stored_weights_have_hardly_more_bytes_than_codes_scales_and_zeros(form, group_size, bits_of_scale):
    """Zeros, 4 bits in a checkpoint, take a byte; nothing else is added."""
    weights = LinearStep(num_tokens=1, rows=208, columns=2048, form=form, group_size=group_size).weights
    rows, columns = weights.shape
    least = rows * columns * weights.bits / 8 + rows * columns / weights.group_size * bits_of_scale / 8
    stored = sum(part.nbytes for part in (weights.codes, weights.scale, weights.zero) if part is not None)
    assert least <= stored <= ALLOWED * least


@pytest.mark.slow
def test_experts_of_a_real_size():
    """Qwen1.5-MoE-A2.7B: hidden 2048, 60 experts of 1408, 4 a token."""
    ids = torch.tensor([[59, 0, 31, 7], [7, 59, 0, 31]], dtype=torch.int32)
    step = MoeStep(num_tokens=2, num_experts=60, k=4, hidden_size=2048, inner_size=1408, form="4", expert_ids=ids)
    tensors, launches = step.prepare(CPU)
    with counting(tensors) as traffic:
        for launch in launches:
            launch.run()
    assert_close(tensors["output"], step.expected())
    numbers = 4 * 3 * 2048 * 1408  # of 4 different experts
    weights = sum(count for name, count in traffic.read.items() if name.startswith(("gate_up", "down")))
    assert weights == numbers // 2 + numbers // 128 * 2
