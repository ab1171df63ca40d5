"""Random steps of `QwenLinear`; where results go is poisoned."""

import math
from dataclasses import dataclass, field

import torch

from qwen_aot.plugins.kernels.linear_reference import LinearWeights, linear_reference, pack_rows
from qwen_aot.plugins.launch import Launch, linear_launches, linear_split, linear_workspace
from qwen_aot.plugins.variants import TACTICS, select
from tests.plugins.gqa_cases import DTYPES, SM, allocate


def make_weights(
    rows: int, columns: int, *, form: str, group_size: int, dtype: torch.dtype, seed: int
) -> LinearWeights:
    """[N, K] random weights; `form` is "8", "4" (symmetric) or "4z" (with zeros, some of them 0 and 16).

    group_size: -1: all of K.
    """
    random = torch.Generator().manual_seed(seed)
    group_size = columns if group_size == -1 else group_size
    blocks = (columns // group_size, rows)
    spread = columns**-0.5 / (73 if form == "8" else 5)  # so that outputs are near 1
    scale = ((torch.rand(blocks, generator=random) + 0.5) * spread).to(dtype)
    if form == "8":
        codes = torch.randint(-128, 128, (rows, columns), generator=random, dtype=torch.int8)
        return LinearWeights(codes, scale, None, 8, group_size)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    zero = torch.randint(0, 17, blocks, generator=random, dtype=torch.int8) if form == "4z" else None
    return LinearWeights(pack_rows(codes), scale, zero, 4, group_size)


@dataclass
class LinearStep:
    """One step."""

    num_tokens: int
    rows: int = 80
    columns: int = 256
    dtype: str = "fp16"
    form: str = "4"
    group_size: int = 128
    has_bias: bool = False
    tactic: int = TACTICS[0]
    sm_count: int = 4
    sm: str = SM
    seed: int = 0
    weights: LinearWeights = field(init=False)
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        dtype = DTYPES[self.dtype]
        random = torch.Generator().manual_seed(self.seed)
        sizes = {"form": self.form, "group_size": self.group_size, "dtype": dtype}
        self.weights = make_weights(self.rows, self.columns, seed=self.seed + 1, **sizes)
        self.tensors = {"x": torch.randn(self.num_tokens, self.columns, generator=random).to(dtype)}
        if self.has_bias:
            self.tensors["bias"] = torch.randn(self.rows, generator=random).to(dtype)

    @property
    def splits(self) -> int:
        """Parts of decode."""
        facts = {"weight_bits": self.weights.bits, "has_zeros": int(self.weights.zero is not None)}
        blocks = "small" if self.weights.group_size < 128 else "large"
        variant = select(self.sm, "linear_decode", dtype=self.dtype, blocks=blocks, tactic=self.tactic, **facts)
        return linear_split(self.rows, self.columns, variant.constants["BLOCK_N"], self.sm_count)[1]

    def expected(self) -> torch.Tensor:
        return linear_reference(self.tensors["x"], self.weights, self.tensors.get("bias"))

    def prepare(self, device: torch.device) -> tuple[dict[str, torch.Tensor], list[Launch]]:
        """Tensors on the device (workspace and output poisoned) by name, and the launches over them."""
        on_device = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        parts = {
            name: tensor.to(device)
            for name in ("codes", "scale", "zero")
            if (tensor := getattr(self.weights, name)) is not None
        }
        weights = LinearWeights(
            parts["codes"], parts["scale"], parts.get("zero"), self.weights.bits, self.weights.group_size
        )
        workspace = allocate(linear_workspace(num_tokens=self.num_tokens, rows=self.rows, splits=self.splits), device)
        output = torch.full((self.num_tokens, self.rows), math.nan, dtype=DTYPES[self.dtype], device=device)
        launches = linear_launches(
            self.sm,
            self.sm_count,
            x=on_device["x"],
            weights=weights,
            bias=on_device.get("bias"),
            output=output,
            workspace=workspace,
            tactic=self.tactic,
        )
        return {**on_device, **parts, **workspace, "output": output}, launches

    def run(self, device: torch.device) -> torch.Tensor:
        tensors, launches = self.prepare(device)
        for launch in launches:
            launch.run()
        return tensors["output"].cpu()
