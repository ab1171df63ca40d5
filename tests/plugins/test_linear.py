import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.errors import BuildError
from qwen_aot.plugins.kernels.linear_reference import LinearWeights, linear_reference, pack_rows, unpack_rows
from qwen_aot.plugins.launch import (
    LINEAR_MIN_SPLIT,
    LINEAR_MOST_SMS,
    LINEAR_PROGRAMS_PER_SM,
    is_linear_decode,
    linear_launches,
    linear_split,
)
from tests.pairs import identifier, swept
from tests.plugins.bounds import assert_close
from tests.plugins.gqa_cases import SM
from tests.plugins.linear_cases import LinearStep

# Weights by form and columns that share a scale; codes of 8 bits have none in small blocks.
WEIGHTS = [*(("8", size) for size in (128, -1)), *((form, size) for form in ("4", "4z") for size in (32, 64, 128, -1))]
FEW = {
    "dtype": ["fp16", "bf16"],
    "weights": WEIGHTS,
    "num_tokens": [1, 2, 7, 16],
    "sizes": [(16, 128), (80, 640), (208, 1152)],
    "has_bias": [False, True],
    "tactic": [1, 2],
    "sm_count": [1, 64],  # one part, or as many as there may be
}
MANY = {
    "dtype": ["fp16", "bf16"],
    "weights": WEIGHTS,
    "num_tokens": [17, 64, 65, 130],
    "sizes": [(16, 128), (80, 640), (208, 256)],
    "has_bias": [False, True],
    "tactic": [1, 2],
}
CPU = torch.device("cpu")


def make(case: dict) -> LinearStep:
    (form, group_size), (rows, columns) = case["weights"], case["sizes"]
    rest = {name: value for name, value in case.items() if name not in ("weights", "sizes")}
    return LinearStep(form=form, group_size=group_size, rows=rows, columns=columns, **rest)


@pytest.mark.parametrize("case", swept(FEW), ids=identifier)
def test_few_tokens(case, device):
    step = make(case)
    assert is_linear_decode(step.num_tokens)
    assert_close(step.run(device), step.expected())


@pytest.mark.parametrize("case", swept(MANY), ids=identifier)
def test_many_tokens(case, device):
    step = make(case)
    assert not is_linear_decode(step.num_tokens)
    assert_close(step.run(device), step.expected())


@pytest.mark.parametrize("form", ["8", "4", "4z"])
@pytest.mark.parametrize("num_tokens", [3, 20])
def test_products_are_those_of_exact_weights_whatever_the_scales(form, num_tokens, device):
    """A scale whose weights no fp16 holds, and one below fp16's normal numbers: codes meet x before any scale."""
    step = LinearStep(num_tokens=num_tokens, form=form)
    for number, value in enumerate((4000.0 if form == "8" else 60000.0, 3e-7)):
        step.weights.scale[:, number::2] = value
    step.tensors["x"] *= 1e-3
    expected = step.expected()
    assert torch.isfinite(expected).all() and expected[:, 1::2].abs().max() > 0
    actual = step.run(device)
    for columns in (slice(0, None, 2), slice(1, None, 2)):  # rows of a result are bounded by their largest
        error = (actual[:, columns].double() - expected[:, columns].double()).abs().max()
        largest = expected[:, columns].double().abs().max()
        assert error <= largest * 2.0**-10 + 2.0**-24  # the last: fp16's smallest step


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_tokens_know_nothing_of_each_other(num_tokens, device):
    """A token of NaN, and one that is computed alone: the others are the same bit for bit."""
    step = LinearStep(num_tokens=num_tokens, form="4z", group_size=32)
    whole = step.run(device)
    poisoned = dataclasses.replace(step)
    poisoned.tensors["x"] = step.tensors["x"].clone()
    poisoned.tensors["x"][1] = torch.nan
    other = poisoned.run(device)
    others = [token for token in range(num_tokens) if token != 1]
    assert torch.equal(other[others], whole[others]) and other[1].isnan().all()


def test_result_is_the_same_bit_for_bit(device):
    step = LinearStep(num_tokens=5, columns=2048, sm_count=64)
    assert step.splits == 4
    assert torch.equal(step.run(device), step.run(device))


@pytest.mark.parametrize(
    ("bits", "rows", "columns", "group_size", "tactic", "said"),
    [
        (4, 24, 256, 128, 1, "N must be a multiple of 16, not 24"),
        (4, 16, 192, 64, 1, "K must be a multiple of 128, not 192"),
        (4, 16, 512, 256, 1, "blocks of 256 columns aren't served; accepted: 32, 64, 128, or all of K, 512"),
        (8, 16, 256, 32, 1, "no variant of linear_decode for SM .* serves .*blocks=small"),
        (4, 16, 256, 128, 3, "no variant of linear_decode for SM .* serves .*tactic=3"),
    ],
)
def test_what_no_kernel_takes_is_refused(bits, rows, columns, group_size, tactic, said):
    codes = torch.zeros(rows * bits // 8, columns, dtype=torch.int8)
    scale = torch.zeros(columns // group_size, rows, dtype=torch.float16)
    with pytest.raises(BuildError, match=said):
        linear_launches(
            SM,
            1,
            x=torch.zeros(2, columns, dtype=torch.float16),
            weights=LinearWeights(codes, scale, None, bits, group_size),
            bias=None,
            output=torch.zeros(2, rows, dtype=torch.float16),
            workspace={},
            tactic=tactic,
        )


@given(
    rows=st.integers(1, 20000).map(lambda count: 16 * count),
    columns=st.integers(1, 300).map(lambda count: 128 * count),
    block_n=st.sampled_from((32, 64, 128)),
    sm_count=st.integers(1, 1000),
)
def test_parts_cover_all_columns_once(rows, columns, block_n, sm_count):
    size, parts = linear_split(rows, columns, block_n, sm_count)
    assert size % 128 == 0 and (parts - 1) * size < columns <= parts * size
    assert parts == 1 or size >= LINEAR_MIN_SPLIT
    programs = -(-rows // block_n)
    assert (parts - 1) * programs < LINEAR_PROGRAMS_PER_SM * min(sm_count, LINEAR_MOST_SMS)


# ---- The reference ----


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_rows_are_packed_and_unpacked_exactly(blocks, columns, seed):
    codes = torch.randint(0, 16, (16 * blocks, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_rows(codes)
    assert packed.shape == (8 * blocks, columns) and packed.dtype == torch.int8
    assert torch.equal(unpack_rows(packed), codes.to(torch.uint8))


def test_a_byte_has_the_codes_of_rows_that_are_eight_apart():
    codes = torch.zeros(32, 3, dtype=torch.uint8)
    codes[16 + 5, 1], codes[16 + 13, 1] = 7, 12
    packed = pack_rows(codes)
    assert packed.view(torch.uint8)[8 + 5, 1] == 0xC7 and packed.count_nonzero() == 1


@pytest.mark.parametrize("form", ["8", "4", "4z"])
def test_weights_are_code_less_zero_times_scale(form):
    step = LinearStep(num_tokens=1, form=form, group_size=128, rows=32)
    weights, row, column = step.weights, 29, 141  # in block 1; the 13th of the second 16 rows
    if form == "8":
        code, zero = int(weights.codes[row, column]), 0
    else:
        code = (int(weights.codes[8 + 5, column]) & 255) >> 4
        zero = 8 if weights.zero is None else int(weights.zero[1, row])
    expected = (code - zero) * weights.scale[1, row].item()
    assert weights.dequantized()[row, column].item() == expected
    one = torch.zeros(1, 256, dtype=torch.float16)
    one[0, column] = 1.0
    assert linear_reference(one, weights)[0, row] == torch.tensor(expected).half()
