"""Tensors of more than 2^31 elements: attention and expert products at their far end, in memory that is never filled.

Address space is all that such a tensor takes; pages are the few that a kernel touches. Programs run at chosen places of
the grid, since a whole one would have millions. An address that wrapped lies outside its tensor, which `counting`
refuses.
"""

import dataclasses
import math
import mmap
from collections.abc import Iterator

import pytest
import torch

from qwen_aot.plugins.kernels.linear_reference import LinearWeights
from qwen_aot.plugins.kernels.moe_reference import ExpertWeights, moe_reference
from qwen_aot.plugins.launch import Launch, gqa_launches, gqa_workspace, linear_launches, moe_launches
from qwen_aot.plugins.variants import MOE_BLOCKS_M
from tests.plugins.bounds import assert_close
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.gqa_cases import SM, GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import make_weights

if not IS_INTERPRETED:
    pytest.skip("programs are placed in Triton's interpreter only", allow_module_level=True)

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle
from triton.runtime.interpreter import interpreter_builder as builder

from tests.plugins.interpreter import counting

FAR = 2**31
_MAP_NORESERVE = 0x4000  # Linux: address space that no memory backs; Python names it from 3.13 on


def sparse(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, of which the system has no page before it is written."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """What is added to each program's index, by axis."""
    first: dict[int, int] = {}

    def program_id(axis: int) -> TensorHandle:
        return TensorHandle(np.array([builder.grid_idx[axis] + first.get(axis, 0)], dtype=np.int32), tl.int32)

    monkeypatch.setattr(builder, "create_get_program_id", program_id, raising=False)
    yield first


def run(launch: Launch, sizes: dict[str, int], tensors: dict[str, torch.Tensor | None]) -> None:
    """The launch over a part of its grid, which may touch these tensors."""
    with counting({name: tensor for name, tensor in tensors.items() if tensor is not None}):
        dataclasses.replace(launch, sizes={**launch.sizes, **sizes}).run()


@pytest.mark.parametrize("steps", [5, 1])
@pytest.mark.parametrize("is_int8", [False, True], ids=["same", "int8"])
def test_attention_of_the_last_row(steps, is_int8, place):
    """Row 1 of 2, in tensors of queries and of keys that each are longer than 2^31 before it."""
    near = GqaStep(
        lengths=[(140, steps)], steps=steps, group=5, num_kv_heads=8, head_dim=128, is_int8=is_int8, capacity=150
    )
    rows, width = (FAR // (40 * 128) + 1 if steps > 1 else 1), (40 + 16) * 128
    capacity = FAR // (8 * 128) + 150
    tensors: dict[str, torch.Tensor | None] = {
        "qkv": sparse(2, rows, width, dtype=torch.float16),
        "position_ids": sparse(2, rows, dtype=torch.int64),
        "cache_length": torch.tensor([0, 140]),
        "new_tokens": torch.tensor([0, steps]),
        "cos": near.tensors["cos"],
        "sin": near.tensors["sin"],
    }
    for name in ("qkv", "position_ids"):
        tensors[name][1, :steps] = near.tensors[name][0]
    for name in ("key", "value", "key_scale", "value_scale"):
        tensor = near.tensors[name]
        tensors[name] = None if tensor is None else sparse(2, 8, capacity, *tensor.shape[3:], dtype=tensor.dtype)
        if tensor is not None:
            tensors[name][1, :, :150] = tensor[0]
    shapes = gqa_workspace(batch=2, steps=rows, num_heads=40, head_dim=128, splits=1, dtype="fp16")
    types = {"fp16": torch.float16, "fp32": torch.float32}
    workspace = {name: sparse(*shape, dtype=types[dtype]) for name, (shape, dtype) in shapes.items()}
    output = sparse(2, rows, 40 * 128, dtype=torch.float16)
    launches = gqa_launches(SM, 1, **tensors, output=output, workspace=workspace, num_heads=40, scale=near.scale)
    everything = {**tensors, **workspace, "output": output}
    for launch in launches:
        place.clear()
        # The axis of rows, by kernel; gqa_rotate's is that of tokens.
        place |= {"gqa_rotate": {0: rows}, "gqa_reduce": {1: 1}}.get(launch.variant.kernel, {2: 1})
        run(launch, {"B": 1, "S": steps}, everything)
    expected = near.expected()
    assert_close(output[1, :steps], expected["output"][0])
    for name in ("key", "value", "key_scale", "value_scale"):
        if expected[name] is not None:
            assert torch.equal(tensors[name][1, :, : 140 + steps], expected[name][0, :, : 140 + steps])


def test_tokens_that_are_padding_are_zeros_to_the_last(place):
    rows = FAR // (16 * 64) + 1
    output = sparse(2, rows, 16 * 64, dtype=torch.float16)
    output[1, -100:] = math.nan
    lengths = torch.tensor([0, 0])
    cache = torch.zeros(2, 2, 1, 64, dtype=torch.float16)
    launches = gqa_launches(
        SM,
        1,
        qkv=output,
        key=cache,
        value=cache,
        key_scale=None,
        value_scale=None,
        cos=cache,
        sin=cache,
        position_ids=lengths,
        cache_length=lengths,
        new_tokens=lengths,
        output=output,
        workspace={"query": output},
        num_heads=16,
        scale=1.0,
    )
    place |= {0: rows // launches[1].variant.constants["BLOCK_M"] - 1, 2: 1}
    run(launches[1], {"B": 1, "S": 2 * launches[1].variant.constants["BLOCK_M"]}, {"output": output, "n": lengths})
    assert (output[1, -100:] == 0).all()


def far_weights(near: ExpertWeights, num_experts: int) -> ExpertWeights:
    """The one expert of `near` as the last of many."""

    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        result = sparse(num_experts, *tensor.shape[1:], dtype=tensor.dtype)
        result[-1] = tensor[0]
        return result

    codes = moved(near.codes)
    assert codes is not None
    return ExpertWeights(codes, moved(near.scale), moved(near.zero), near.bits)


@pytest.mark.parametrize("form", ["16", "8", "4z"])
@pytest.mark.parametrize("num_tokens", [3, FAR // 128 + 3])
def test_the_last_expert_and_the_last_tokens(form, num_tokens, place):
    """Three tokens, the last ones, of expert E-1; hidden, inner, partial, output and weights pass 2^31 before them."""
    size, tokens = 128, 3
    num_experts = FAR // (size * size) * (2 if form == "4z" else 1) + 1
    near = {
        name: make_weights(1, rows, size, chosen=[0], form=form, dtype=torch.float16, seed=rows)
        for name, rows in (("gate_up", 2 * size), ("down", size))
    }
    weights = {name: far_weights(part, num_experts) for name, part in near.items()}
    hidden = sparse(num_tokens, size, dtype=torch.float16)
    ids, routing = (sparse(num_tokens, 1, dtype=dtype) for dtype in (torch.int32, torch.float32))
    few = torch.randn(tokens, size, generator=torch.Generator().manual_seed(0)).half()
    hidden[-tokens:], ids[-tokens:], routing[-tokens:] = few, num_experts - 1, torch.tensor([[0.5], [1.0], [2.0]])
    workspace = {
        "inner": sparse(num_tokens, size, dtype=torch.float16),
        "partial": sparse(num_tokens, size, dtype=torch.float32),
        "counts": torch.zeros(1, dtype=torch.int32),
        "sorted_entries": torch.full((MOE_BLOCKS_M[0],), num_tokens, dtype=torch.int32),
        "block_experts": torch.tensor([num_experts - 1], dtype=torch.int32),
        "num_blocks": torch.tensor([1], dtype=torch.int32),
    }
    workspace["sorted_entries"][:tokens] = torch.arange(num_tokens - tokens, num_tokens)
    output = sparse(num_tokens, size, dtype=torch.float16)
    tensors = {"hidden": hidden, "expert_ids": ids, "expert_weights": routing}
    launches = moe_launches(SM, **tensors, **weights, output=output, workspace=workspace)
    everything: dict[str, torch.Tensor | None] = {**tensors, **workspace, "output": output}
    for name, part in weights.items():
        everything |= {name: part.codes, f"{name}_scale": part.scale, f"{name}_zero": part.zero}
    for launch in launches[-3:]:  # what counts and scatters reads ids alone, of which there are few
        place |= {0: num_tokens - tokens if launch.variant.kernel == "moe_sum" else 0}
        run(launch, {"T": tokens, "padded_entries": MOE_BLOCKS_M[0]}, everything)
    of_near = torch.zeros(tokens, 1, dtype=torch.int32)
    assert_close(output[-tokens:], moe_reference(few, of_near, routing[-tokens:], **near))


@pytest.mark.parametrize("form", ["8", "4z"])
@pytest.mark.parametrize("num_tokens", [3, FAR // 128 + 20])
def test_the_last_rows_of_a_projection_and_the_last_tokens(form, num_tokens, place):
    """The last 16 rows of weights, whose codes (and, of many tokens, x) pass 2^31 elements before them."""
    tokens, columns = min(num_tokens, 20), 128
    near = LinearStep(num_tokens=tokens, rows=128, columns=columns, form=form, group_size=32 if form == "4z" else 128)
    rows = (FAR // columns * (2 if form == "4z" else 1) + 256) // 128 * 128 if num_tokens == 3 else 128
    x = sparse(num_tokens, columns, dtype=torch.float16)
    x[-tokens:] = near.tensors["x"]
    parts = {}
    for name in ("codes", "scale", "zero"):
        tensor = getattr(near.weights, name)
        if tensor is None:
            parts[name] = None
            continue
        shape = (rows // (128 // tensor.shape[0]), columns) if name == "codes" else (tensor.shape[0], rows)
        parts[name] = sparse(*shape, dtype=tensor.dtype)
        if name == "codes":
            parts[name][-tensor.shape[0] :] = tensor
        else:
            parts[name][:, -128:] = tensor
    weights = LinearWeights(**parts, bits=near.weights.bits, group_size=near.weights.group_size)
    output = sparse(num_tokens, rows, dtype=torch.float16)
    partial = torch.zeros(4)
    launches = linear_launches(SM, 1, x=x, weights=weights, bias=None, output=output, workspace={"partial": partial})
    (launch,) = launches
    constants = launch.variant.constants
    if num_tokens == 3:
        place |= {0: (rows - 128) // constants["BLOCK_N"]}
    else:
        place |= {0: num_tokens // constants["BLOCK_M"] - 1}
    names = {"x": x, **parts, "output": output, "partial": partial}
    run(launch, {"T": 2 * constants["BLOCK_M"], "N": 128}, names)
    assert_close(output[-tokens:, -128:], near.expected())
