"""Random steps of `QwenMoE`; weights of experts that nobody chose are poisoned, and so is where results go."""

import math
from dataclasses import dataclass, field

import torch

from qwen_aot.plugins.kernels.moe_reference import BLOCK, ExpertWeights, moe_reference, pack_nibbles
from qwen_aot.plugins.launch import Launch, moe_launches, moe_workspace
from qwen_aot.plugins.variants import TACTICS
from tests.plugins.gqa_cases import DTYPES, SM, allocate, apart


def make_weights(
    num_experts: int, rows: int, columns: int, *, chosen: list[int], form: str, dtype: torch.dtype, seed: int
) -> ExpertWeights:
    """[E, N, K] with random weights of the chosen experts and NaN (in scales, where there are some) elsewhere.

    `form` is "16", "8", "4" (symmetric) or "4z" (with zeros, some of them 0 and 16).
    """
    random = torch.Generator().manual_seed(seed)
    at = torch.tensor(chosen, dtype=torch.long)
    spread = columns**-0.5  # so that outputs are near 1

    def filled(shape: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
        if values.dtype == torch.int8:
            result = torch.zeros((num_experts, *shape), dtype=torch.int8)
        else:
            result = torch.full((num_experts, *shape), math.nan, dtype=values.dtype)
        result[at] = values
        return result

    count = len(chosen)
    if form == "16":
        values = (torch.randn(count, rows, columns, generator=random) * spread).to(dtype)
        return ExpertWeights(filled((rows, columns), values), None, None, 16)
    if form == "8":
        codes = torch.randint(-127, 128, (count, rows, columns), generator=random, dtype=torch.int8)
        scale = ((torch.rand(count, rows, generator=random) + 0.5) * spread / 73).to(dtype)
        return ExpertWeights(filled((rows, columns), codes), filled((rows,), scale), None, 8)
    nibbles = torch.randint(0, 16, (count, rows, columns), generator=random, dtype=torch.int8)
    blocks = (rows, columns // BLOCK)
    scale = ((torch.rand(count, *blocks, generator=random) + 0.5) * spread / 5).to(dtype)
    zero = None
    if form == "4z":
        zero = filled(blocks, torch.randint(0, 17, (count, *blocks), generator=random, dtype=torch.int8))
    return ExpertWeights(filled((rows, columns // 2), pack_nibbles(nibbles)), filled(blocks, scale), zero, 4)


def route(num_tokens: int, num_experts: int, k: int, routing: str, seed: int) -> torch.Tensor:
    """[T, k] int32, distinct within a token: "random"; "same", all tokens choose alike; "skip", never an odd expert."""
    random = torch.Generator().manual_seed(seed)
    choice = torch.rand(num_tokens, num_experts, generator=random)
    if routing == "same":
        choice[:] = choice[0]
    if routing == "skip" and num_experts // 2 >= k:
        choice[:, 1::2] = -1.0
    return choice.topk(k, dim=1).indices.to(torch.int32)


def spread(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Ids [T, k] as a step is timed with: of a token that hasn't distinct experts, those after the last one's."""
    in_turn = torch.arange(ids.numel(), dtype=ids.dtype).view(ids.shape) % num_experts
    is_routed = [len({*row} & {*range(num_experts)}) == len(row) for row in ids.tolist()]
    return torch.where(torch.tensor(is_routed).view(-1, 1), ids, in_turn)


@dataclass
class MoeStep:
    """One step; with `is_timed`, as the builder times it, with ids that needn't mean anything."""

    num_tokens: int
    num_experts: int = 5
    k: int = 2
    hidden_size: int = 128
    inner_size: int = 128
    dtype: str = "fp16"
    form: str = "16"
    routing: str = "random"
    expert_ids: torch.Tensor | None = None
    sm: str = SM
    tactic: int = TACTICS[0]
    is_timed: bool = False
    seed: int = 0
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        dtype = DTYPES[self.dtype]
        random = torch.Generator().manual_seed(self.seed)
        ids = self.expert_ids
        if ids is None:
            ids = route(self.num_tokens, self.num_experts, self.k, self.routing, self.seed)
        self.used_ids = spread(ids, self.num_experts) if self.is_timed and ids.numel() else ids
        chosen = [expert for expert in self.used_ids.unique().tolist() if 0 <= expert < self.num_experts]
        sizes = {"chosen": chosen, "form": self.form, "dtype": dtype}
        self.num_chosen = len(chosen)
        self.gate_up = make_weights(
            self.num_experts, 2 * self.inner_size, self.hidden_size, seed=self.seed + 1, **sizes
        )
        self.down = make_weights(self.num_experts, self.hidden_size, self.inner_size, seed=self.seed + 2, **sizes)
        self.tensors = {
            "hidden": torch.randn(self.num_tokens, self.hidden_size, generator=random).to(dtype),
            "expert_ids": ids,
            "expert_weights": torch.rand(ids.shape, generator=random),
        }

    def expected(self) -> torch.Tensor:
        return moe_reference(**self.tensors | {"expert_ids": self.used_ids}, gate_up=self.gate_up, down=self.down)

    def prepare(self, device: torch.device) -> tuple[dict[str, torch.Tensor], list[Launch]]:
        """Tensors on the device (workspace and output poisoned) by name, and the launches over them."""
        on_device = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        gate_up, down = (_to_device(weights, device) for weights in (self.gate_up, self.down))
        shapes = moe_workspace(
            num_tokens=self.num_tokens,
            k=self.k,
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            inner_size=self.inner_size,
            dtype=self.dtype,
            is_timed=self.is_timed,
        )
        workspace = allocate(shapes, device)
        output = torch.full_like(on_device["hidden"], math.nan)
        launches = moe_launches(
            self.sm,
            **on_device,
            gate_up=gate_up,
            down=down,
            output=output,
            workspace=workspace,
            tactic=self.tactic,
            is_timed=self.is_timed,
        )
        tensors = {**on_device, **apart(workspace, on_device), "output": output}
        for name, weights in (("gate_up", gate_up), ("down", down)):
            parts = {"": weights.codes, "_scale": weights.scale, "_zero": weights.zero}
            tensors |= {f"{name}{part}": tensor for part, tensor in parts.items() if tensor is not None}
        return tensors, launches

    def run(self, device: torch.device) -> torch.Tensor:
        tensors, launches = self.prepare(device)
        for launch in launches:
            launch.run()
        return tensors["output"].cpu()


def _to_device(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    scale, zero = (None if tensor is None else tensor.to(device) for tensor in (weights.scale, weights.zero))
    return ExpertWeights(weights.codes.to(device), scale, zero, weights.bits)
