"""The model's bytes and products against those of the kernels, counted while the interpreter runs them."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from qwen_aot.plugins.launch import Launch
from qwen_aot.plugins.performance.costs import Cost, attention_costs, even_counts, expert_costs, linear_costs
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.gqa_cases import SM, GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep

if not IS_INTERPRETED:
    pytest.skip("bytes are counted in Triton's interpreter only", allow_module_level=True)

from triton.runtime.interpreter import interpreter_builder as builder

from tests.plugins.interpreter import counting

CPU = torch.device("cpu")


@dataclass
class Counts:
    """What one launch did."""

    read: Counter[str]
    written: Counter[str]
    flops: int = 0
    touched: dict[str, np.ndarray] = field(default_factory=dict)  # whether each byte began a load or store, by tensor


@contextlib.contextmanager
def watching(tensors: dict[str, torch.Tensor]) -> Iterator[Counts]:
    """`counting`, and with it the products' operations and the distinct addresses of each tensor."""
    starts = {name: (tensor.data_ptr(), tensor.nbytes) for name, tensor in tensors.items()}
    with counting(tensors) as traffic:
        counts = Counts(traffic.read, traffic.written)
        counted_load, counted_store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

        def note(pointers, mask):
            addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            if addresses.size:
                first = int(addresses.min())
                (name,) = [name for name, (start, size) in starts.items() if start <= first < start + size]
                start, size = starts[name]
                counts.touched.setdefault(name, np.zeros(size, bool))[addresses - np.uint64(start)] = True

        def load(pointers, mask, *rest):  # type: ignore[no-untyped-def]
            note(pointers, mask)
            return counted_load(pointers, mask, *rest)

        def store(pointers, value, mask, *rest):  # type: ignore[no-untyped-def]
            note(pointers, mask)
            return counted_store(pointers, value, mask, *rest)

        def multiply(a, b, *rest):  # type: ignore[no-untyped-def]
            counts.flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return dot(a, b, *rest)

        builder.create_masked_load, builder.create_masked_store, builder.create_dot = load, store, multiply
        try:
            yield counts
        finally:
            builder.create_dot = dot


def check(costs: list[Cost], launches: list[Launch], tensors: dict[str, torch.Tensor | None]) -> None:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.numel()}
    assert [cost.variant for cost in costs] == [launch.variant for launch in launches]
    for cost, launch in zip(costs, launches, strict=True):
        assert cost.launched == math.prod(launch.variant.grid(launch.sizes))
        with watching(present) as counts:
            launch.run()
        for modelled, counted in ((cost.reads, counts.read), (cost.writes, counts.written)):
            assert set(counted) == set(modelled), launch.variant.kernel
            for name, access in modelled.items():
                assert access.requested == counted[name], f"{launch.variant.kernel}: {name}"
                distinct = int(counts.touched[name].sum()) * present[name].element_size()
                assert access.distinct == distinct, f"{launch.variant.kernel}: {name}"
        assert cost.tensor_flops == counts.flops, launch.variant.kernel
        assert cost.working <= cost.launched
        assert cost.requested_bytes == sum(counts.read.values()) + sum(counts.written.values())
        assert not cost.tensor_flops or cost.useful_flops <= cost.tensor_flops


@pytest.mark.parametrize(
    ("new", "cached", "group", "head_dim", "is_int8", "batch", "tactic"),
    [
        (1, 700, 1, 64, False, 2, 1),
        (1, 700, 1, 64, False, 1, 2),
        (1, 1500, 5, 128, True, 1, 1),
        (1, 511, 16, 64, True, 2, 2),
        (1, 1023, 3, 128, False, 1, 1),
        (130, 0, 2, 64, False, 1, 1),
        (130, 70, 2, 64, False, 1, 2),
        (70, 301, 1, 128, True, 2, 2),
        (200, 90, 5, 128, False, 1, 1),
        (200, 90, 2, 128, False, 1, 2),
        (64, 64, 2, 64, True, 1, 1),
    ],
)
def test_attention(new, cached, group, head_dim, is_int8, batch, tactic):
    step = GqaStep(
        lengths=[(cached, new)] * batch,
        steps=new,
        group=group,
        num_kv_heads=2,
        is_int8=is_int8,
        head_dim=head_dim,
        capacity=4096,
        sm_count=20,
        tactic=tactic,
    )
    tensors, launches = step.prepare(CPU)
    costs = attention_costs(
        SM,
        20,
        num_heads=2 * group,
        num_kv_heads=2,
        head_dim=head_dim,
        batch=batch,
        new=new,
        cached=cached,
        capacity=4096,
        cache="int8" if is_int8 else "same",
        tactic=tactic,
    )
    check(costs, launches, tensors)


EXPERTS = [
    # form, T, tactic
    *(("16", 1, 1), ("8", 5, 2), ("4", 5, 1), ("4z", 5, 1), ("16", 80, 1), ("4z", 80, 1), ("8", 80, 2), ("4", 80, 2)),
]


@pytest.mark.parametrize(("form", "num_tokens", "tactic"), EXPERTS)
def test_experts(form, num_tokens, tactic):
    hidden_size, inner_size, num_experts, k = 256, 384, 6, 2
    sizes = {"hidden_size": hidden_size, "inner_size": inner_size, "tactic": tactic}
    step = MoeStep(num_tokens=num_tokens, num_experts=num_experts, k=k, form=form, **sizes)
    tensors, launches = step.prepare(CPU)
    counts = torch.bincount(step.tensors["expert_ids"].flatten().long(), minlength=num_experts).tolist()
    costs = expert_costs(
        SM,
        counts=counts,
        num_tokens=num_tokens,
        k=k,
        **sizes,
        bits=int(form[:2].rstrip("z")),
        has_zeros=form == "4z",
    )
    check(costs, launches, tensors)


LINEAR = [
    # T, N, K, form, group, bias, tactic
    (1, 80, 256, "4", 128, True, 1),
    (5, 208, 2048, "4", 128, True, 2),  # in parts
    (16, 48, 1152, "8", 1152, False, 1),
    (3, 144, 256, "4z", 32, False, 1),
    (80, 80, 256, "4", 64, True, 1),
    (130, 208, 256, "8", 128, True, 2),
    (70, 48, 256, "4z", 128, False, 1),
]


@pytest.mark.parametrize(("num_tokens", "rows", "columns", "form", "group_size", "has_bias", "tactic"), LINEAR)
def test_linear(num_tokens, rows, columns, form, group_size, has_bias, tactic):
    sizes = {"rows": rows, "columns": columns, "group_size": group_size, "has_bias": has_bias, "tactic": tactic}
    step = LinearStep(num_tokens=num_tokens, form=form, sm_count=20, **sizes)
    tensors, launches = step.prepare(CPU)
    costs = linear_costs(SM, 20, num_tokens=num_tokens, bits=int(form[0]), has_zeros=form == "4z", **sizes)
    check(costs, launches, tensors)


def test_useful_products_are_those_of_the_reference():
    """2 · 2 · D operations for each query and slot that it sees, whatever the tiles."""
    new, cached, heads, head_dim = 5, 3, 4, 64
    visible = sum(cached + token + 1 for token in range(new))
    shape = {"num_heads": heads, "num_kv_heads": 2, "head_dim": head_dim, "batch": 3, "capacity": 256}
    _, prefill = attention_costs(SM, 20, new=new, cached=cached, **shape)
    assert prefill.useful_flops == 3 * heads * visible * 4 * head_dim
    _, decode = attention_costs(SM, 20, new=1, cached=7, **shape)
    assert decode.useful_flops == 3 * heads * 8 * 4 * head_dim


def test_even_counts_read_as_many_experts_as_can_be():
    assert even_counts(8, 4, 60) == [1] * 32 + [0] * 28
    assert sum(even_counts(512, 4, 60)) == 2048 and set(even_counts(512, 4, 60)) == {34, 35}
