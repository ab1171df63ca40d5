import pytest
import torch

from qwen_aot.errors import BuildError
from qwen_aot.plugins.launch import is_moe_decode, most_blocks
from qwen_aot.plugins.variants import MOE_BLOCKS_M, TACTICS
from tests.pairs import identifier, swept
from tests.plugins.bounds import assert_close
from tests.plugins.moe_cases import MoeStep

FORMS = ["16", "8", "4", "4z"]
FEW = {
    "dtype": ["fp16", "bf16"],
    "form": FORMS,
    "experts": [(2, 1), (2, 2), (5, 3), (8, 8), (60, 4), (64, 8)],
    "num_tokens": [1, 2, 7, 16],
    "routing": ["random", "same", "skip"],
    "sizes": [(128, 128), (256, 128), (128, 384)],
    "tactic": [1, 2],
}
MANY = {
    "dtype": ["fp16", "bf16"],
    "form": FORMS,
    "experts": [(2, 1), (2, 2), (5, 3), (8, 8), (60, 4)],
    "num_tokens": [17, 64, 65, 130],
    "routing": ["random", "same", "skip"],
    "sizes": [(128, 128), (256, 128), (128, 384)],
    "tactic": [1, 2],
}


def make(case: dict) -> MoeStep:
    (num_experts, k), (hidden_size, inner_size) = case["experts"], case["sizes"]
    rest = {name: value for name, value in case.items() if name not in ("experts", "sizes")}
    return MoeStep(num_experts=num_experts, k=k, hidden_size=hidden_size, inner_size=inner_size, **rest)


@pytest.mark.parametrize("case", swept(FEW), ids=identifier)
def test_few_tokens(case, device):
    step = make(case)
    assert is_moe_decode(step.num_tokens, step.k)
    assert_close(step.run(device), step.expected())


@pytest.mark.parametrize("case", swept(MANY), ids=identifier)
def test_many_tokens(case, device):
    step = make(case)
    assert not is_moe_decode(step.num_tokens, step.k)
    assert_close(step.run(device), step.expected())


@pytest.mark.parametrize("num_tokens", [2, 17])
def test_more_choices_than_the_decode_path_holds(num_tokens, device):
    step = MoeStep(num_tokens=num_tokens, num_experts=12, k=9)
    assert not is_moe_decode(step.num_tokens, step.k)
    assert_close(step.run(device), step.expected())


@pytest.mark.parametrize("num_tokens", [3, 20])
def test_ids_outside_the_experts_count_as_zero(num_tokens, device):
    ids = torch.arange(num_tokens * 2, dtype=torch.int32).view(num_tokens, 2) % 3
    ids[0] = torch.tensor([-1, 1])
    ids[1] = torch.tensor([3, -7])
    step = MoeStep(num_tokens=num_tokens, num_experts=3, k=2, expert_ids=ids)
    actual = step.run(device)
    assert_close(actual, step.expected())
    assert (actual[1] == 0).all()


def test_result_is_the_same_bit_for_bit(device):
    step = MoeStep(num_tokens=20, num_experts=4, k=3)
    assert torch.equal(step.run(device), step.run(device))


@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize(
    ("num_experts", "k", "num_tokens", "routing"),
    [(60, 4, 40, "random"), (2, 1, 64, "same"), (3, 2, 1100, "random"), (1500, 1, 17, "random")],
)
def test_blocks(num_experts, k, num_tokens, routing, tactic, device):
    step = MoeStep(num_tokens=num_tokens, num_experts=num_experts, k=k, routing=routing, tactic=tactic)
    block_m = MOE_BLOCKS_M[tactic - 1]
    # Experts of 128 · 128 weights would be slow to make for 1500 of them, and the grouping reads none.
    tensors, launches = step.prepare(device)
    for launch in launches[:2]:
        launch.run()
    ids = step.tensors["expert_ids"].flatten().tolist()
    expected = []
    for expert in range(num_experts):
        entries = [entry for entry, of in enumerate(ids) if of == expert]
        while entries:
            block, entries = entries[:block_m], entries[block_m:]
            expected.append((expert, block + [len(ids)] * (block_m - len(block))))
    count = int(tensors["num_blocks"])
    assert count == len(expected) <= most_blocks(len(ids), num_experts, block_m)
    assert tensors["block_experts"][:count].tolist() == [expert for expert, _ in expected]
    assert tensors["sorted_entries"][: count * block_m].view(-1, block_m).tolist() == [block for _, block in expected]
    assert (tensors["block_experts"][count:] == -1).all()  # nothing beyond is written
    assert (tensors["sorted_entries"][count * block_m :] == -1).all()


def test_sizes_that_are_not_whole_blocks_are_refused():
    with pytest.raises(BuildError, match="hidden size must be a multiple of 128, not 192"):
        MoeStep(num_tokens=1, hidden_size=192).prepare(torch.device("cpu"))
    with pytest.raises(BuildError, match="intermediate size must be a multiple of 128, not 64"):
        MoeStep(num_tokens=1, inner_size=64).prepare(torch.device("cpu"))
