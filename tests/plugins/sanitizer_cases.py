"""A few steps of each kernel on the GPU, for compute-sanitizer: `python -m tests.plugins.sanitizer_cases`.

Sizes sit on no block's edge, so that every mask matters; tensors are allocated one by one (see `ENVIRONMENT`), so that
an access beyond one of them is an access outside of all memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.plugins.any_step import Step
from tests.plugins.bounds import assert_close
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep

# PyTorch would otherwise carve tensors out of large blocks, within which the sanitizer sees no bounds.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}

CASES: dict[str, Callable[[], Step]] = {
    "prefill": lambda: GqaStep(lengths=[(61, 70), (0, 3), (9, 0)], steps=70, group=3),
    "prefill, second tiles": lambda: GqaStep(lengths=[(61, 70), (3, 0)], steps=70, head_dim=128, tactic=2),
    "prefill, int8 cache": lambda: GqaStep(lengths=[(131, 33)], steps=33, head_dim=128, is_int8=True, group=2),
    "decode, one head": lambda: GqaStep(lengths=[(700, 1), (5, 0), (0, 1)], steps=1, head_dim=128, capacity=701),
    "decode, group": lambda: GqaStep(lengths=[(1029, 1), (64, 1)], steps=1, group=5, head_dim=128, sm_count=64),
    "decode, smaller parts": lambda: GqaStep(lengths=[(700, 1)], steps=1, group=2, sm_count=64, tactic=2),
    "decode, int8 cache": lambda: GqaStep(lengths=[(900, 1)], steps=1, group=16, is_int8=True, sm_count=64),
    "experts, few tokens": lambda: MoeStep(num_tokens=5, num_experts=7, k=3, form="16"),
    "experts, few tokens, int4": lambda: MoeStep(num_tokens=3, num_experts=4, form="4z", hidden_size=256),
    "experts, many tokens": lambda: MoeStep(num_tokens=75, num_experts=7, k=3, form="8"),
    "experts, few tokens, second tiles": lambda: MoeStep(num_tokens=5, num_experts=7, k=3, form="8", tactic=2),
    "experts, blocks of 32": lambda: MoeStep(num_tokens=75, num_experts=7, k=3, form="4z", tactic=2),
    "experts, many tokens, int4": lambda: MoeStep(num_tokens=33, num_experts=4, form="4z", inner_size=384),
    "projection, few tokens": lambda: LinearStep(num_tokens=5, rows=208, columns=1152, has_bias=True, sm_count=64),
    "projection, few tokens, int8": lambda: LinearStep(num_tokens=1, rows=48, form="8", group_size=-1, tactic=2),
    "projection, many tokens": lambda: LinearStep(num_tokens=75, rows=208, form="4z", group_size=32),
    "projection, many tokens, int8": lambda: LinearStep(num_tokens=130, rows=144, form="8", has_bias=True, tactic=2),
}


def run(device: torch.device) -> None:
    """Runs all cases and compares each with its reference."""
    for make in CASES.values():
        step = make()
        if isinstance(step, GqaStep):
            found, want = step.run(device)["output"], step.expected()["output"]
            assert found is not None and want is not None
        else:
            found, want = step.run(device), step.expected()
        assert_close(found, want)


if __name__ == "__main__":
    run(torch.device("cuda"))
    print(f"{len(CASES)} cases ran")
