"""Weights rounded as each form of the standard lowering stores them, in plain PyTorch: its graphs must equal these.

Written from the definitions (docs/tensorrt.md), apart from the code under test.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

INT8_UNIT, FP8_UNIT = 2.0**-12, 2.0**-14
SMALLEST = 2.0**-24  # of float16


def rounded_model(model: Any, form: str, *, rounds_rotary: bool = True) -> Any:
    """A copy of a transformers model, fp32, that holds the values of `form`: fp16, bf16, int8, int4 or fp8.

    Projections take the form, and everything that isn't a norm the compute type: bf16 for itself, else fp16. So do the
    rotary tables, unless a plugin reads them.
    """
    compute = torch.bfloat16 if form == "bf16" else torch.float16
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.endswith("norm.weight"):
                continue
            values = parameter.to(compute).float()
            if form in FORMS and name.endswith("_proj.weight"):
                values = FORMS[form](values)
            parameter.copy_(values)
    rotary = result.model.rotary_emb
    tables = rotary.forward
    if not rounds_rotary:
        return result

    def rounded_tables(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(table.to(compute).float() for table in tables(*args, **kwargs))

    rotary.forward = rounded_tables
    return result


def rounded_experts(model: Any, form: str) -> Any:
    """The model with its routed experts [E, N, K] in a form of the QwenMoE plugin, in place: int8 or int4."""
    for name, parameter in model.named_parameters():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            rows = parameter.data.reshape(-1, parameter.shape[-1])
            rounded = int8(rows, unit=1.0) if form == "int8" else int4(rows)
            parameter.data.copy_(rounded.reshape(parameter.shape))
    return model


def int8(weight: torch.Tensor, unit: float = INT8_UNIT) -> torch.Tensor:
    """One scale a row: the largest magnitude is code 127."""
    scale = _channel_scale(weight, 127, unit)
    return (weight / scale).round().clamp(-127, 127) * scale


def fp8(weight: torch.Tensor) -> torch.Tensor:
    """One scale a row: the largest magnitude is 448."""
    scale = _channel_scale(weight, 448, FP8_UNIT)
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def _channel_scale(weight: torch.Tensor, largest: int, unit: float) -> torch.Tensor:
    multiples = (weight.abs().amax(1, keepdim=True) / largest / unit).half().clamp(min=SMALLEST)
    return multiples.float() * unit


def int4(weight: torch.Tensor) -> torch.Tensor:
    """Codes from -8 to 7 in blocks of 128, 64 or 32; where none divides the row, int8."""
    width = weight.shape[1]
    block = next((size for size in (128, 64, 32) if width % size == 0), None)
    if block is None:
        return int8(weight)
    blocks = weight.view(len(weight), -1, block)
    best, least = torch.zeros(()), torch.full(blocks.shape[:2], float("inf"))
    for factor in (1.0, 1.04, 1.08, 1.14):
        scale = blocks.abs().amax(2) / 8 * factor
        codes = (blocks / scale[..., None]).round().clamp(-8, 7)
        error = (codes * scale[..., None] - blocks).square().sum(2)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(least, error)
    stored = best.half().clamp(min=SMALLEST).float()[..., None]
    return ((blocks / stored).round().clamp(-8, 7) * stored).reshape(weight.shape)


FORMS = {"int8": int8, "int4": int4, "fp8": fp8}
