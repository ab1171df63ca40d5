"""A quantized folder's weights in fp32, unpacked here from the formats' definitions and not by our own reader.

    weight[n, k] = (code[n, k] - zero[n, group of k]) * scale[n, group of k]

Sources, by format:

- GPTQ: `qweight` int32 [K * bits / 32, N], low bits first along K; `qzeros` int32 [G, N * bits / 32], low bits first
  along N; `scales` [G, N]; `g_idx` [K], the group of each column (AutoGPTQ's and GPTQModel's `TorchQuantLinear`).
- AWQ: `qweight` int32 [K, N / 8], `qzeros` [G, N / 8], `scales` [G, N]; nibble i of a word is column
  (0, 2, 4, 6, 1, 3, 5, 7)[i] of eight (AutoAWQ's `WQLinear_GEMM`).
- compressed-tensors: `weight_packed` int32 [N, ceil(K * bits / 32)], `weight_scale` [N, G], `weight_zero_point`
  [N * bits / 32, G], `weight_shape`, `weight_g_idx` (its `pack_to_int32`); or `weight` int8 [N, K], `weight_scale`,
  `weight_zero_point` int8 [N, G], and `input_scale` [1] of what is rounded in front of the product (its
  `NaiveQuantizationCompressor`); or `weight` float8_e4m3fn [N, K], `weight_scale` [N, 1] or [1], `input_scale` [1].

The folder was opened before this is called, so that what is wrong with it has been said.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from qwen_aot.errors import CheckpointError

_WORD_BITS = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_Parts = Mapping[str, torch.Tensor]
_WITH_BIASES = ("q_proj", "k_proj", "v_proj")
_rounds: ContextVar[bool] = ContextVar("_rounds", default=True)


def dequantized(path: Path, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A folder's tensors with fp32 weights [N, K] in the place of quantized modules'; biases of zeros are left out.

    Args:
        path: the folder, whose configuration names the format.
        stored: its tensors by name.

    Raises:
        CheckpointError: the configuration names none of three formats.
    """
    settings = _settings(path)
    method = settings.get("quant_method")
    if method not in _UNPACK:
        raise CheckpointError(f"{path}: quant_method {method!r} has no second reader; accepted: {', '.join(_UNPACK)}")
    key = {"gptq": "qweight", "awq": "qweight"}.get(method, "weight_scale")
    modules = [name.removesuffix(f".{key}") for name in stored if name.endswith(f".{key}")]
    taken = {module: _parts(module, stored) for module in modules}
    inside = {f"{module}.{part}" for module, parts in taken.items() for part in parts}
    state = {name: tensor for name, tensor in stored.items() if name not in inside}
    for module, parts in taken.items():
        state[f"{module}.weight"] = _UNPACK[method](parts, settings)
        bias = state.get(f"{module}.bias")
        if bias is not None and module.rpartition(".")[2] not in _WITH_BIASES and not bias.any():
            del state[f"{module}.bias"]  # packers of GPTQ give every linear one
    return state


def round_inputs(model: torch.nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Makes each linear round what it reads as a W8A8 folder says, to multiples of `input_scale`.

    Beside weights of int8 these are whole ones from -128 to 127; beside float8_e4m3fn its numbers, 448 at most.

    Args:
        model: whose linears are called as the folder's modules.
        stored: the folder's tensors by name.
    """

    def rounded(scale: float, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (torch.round(inputs[0] / scale).clamp(-128, 127) * scale,)

    def rounded_to_floats(scale: float, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return ((inputs[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(inputs[0].dtype) * scale,)

    def unless_switched_off(
        form: Callable[[float, tuple[torch.Tensor, ...]], tuple[torch.Tensor]],
        scale: float,
        module: torch.nn.Module,
        inputs: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        return form(scale, inputs) if _rounds.get() else inputs

    for name, module in model.named_modules():
        scale = stored.get(f"{name}.input_scale")
        if scale is not None:
            is_float = stored[f"{name}.weight"].dtype == torch.float8_e4m3fn
            form = rounded_to_floats if is_float else rounded
            module.register_forward_pre_hook(functools.partial(unless_switched_off, form, float(scale)))


@contextlib.contextmanager
def inputs_as_they_are() -> Iterator[None]:
    """Inside, in this thread, models round no inputs (`round_inputs`): the same weights in ordinary products."""
    token = _rounds.set(False)
    try:
        yield
    finally:
        _rounds.reset(token)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index where they are all there, else the one file."""
    for index in sorted(path.glob("*.safetensors.index.json")):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if all((path / name).is_file() for name in names):
            return [path / name for name in names]
    whole = path / "model.safetensors"
    return [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))[:1]


def _parts(module: str, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    beside = {name.rpartition(".")[2]: name for name in stored if name.rpartition(".")[0] == module}
    return {last: stored[name] for last, name in beside.items() if last != "bias"}


def _settings(path: Path) -> dict[str, Any]:
    """`quantization_config`, or the file that older packers wrote in its place."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if isinstance(found := config.get("quantization_config"), dict):
        return found
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (path / name).is_file():
            beside: dict[str, Any] = json.loads((path / name).read_text(encoding="utf-8"))
            return {"quant_method": method} | beside
    return {}


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., n] int64 words -> [..., n, 32 / bits], the lowest bits first."""
    fields: torch.Tensor = (words[..., None] >> torch.arange(0, _WORD_BITS, bits)) & (2**bits - 1)
    return fields


def _unsigned(words: torch.Tensor) -> torch.Tensor:
    return words.to(torch.int64) & 0xFFFFFFFF


def _combined(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Codes [N, K], zeros and scales [N, G], group [K] -> weights [N, K]."""
    weights: torch.Tensor = (codes - zeros[:, group]).float() * scales.float()[:, group]
    return weights


def _in_place(width: int, groups: int) -> torch.Tensor:
    """The group of each column, where groups are runs of columns."""
    return torch.arange(width) // -(-width // groups)


def _gptq(parts: _Parts, settings: Mapping[str, Any]) -> torch.Tensor:
    scales = parts["scales"]
    groups, rows = scales.shape
    bits = _WORD_BITS * parts["qzeros"].shape[1] // rows
    codes = _fields(_unsigned(parts["qweight"]).T, bits).reshape(rows, -1)
    width = codes.shape[1]
    group = parts["g_idx"].long() if "g_idx" in parts else _in_place(width, groups)
    return _combined(codes, _gptq_zeros(parts["qzeros"], bits, settings).reshape(groups, rows).T, scales.T, group)


def _gptq_zeros(words: torch.Tensor, bits: int, settings: Mapping[str, Any]) -> torch.Tensor:
    """v1 stores a word of zeros less 1 in each field: adding 1 to all of them, as one number, undoes it."""
    if settings.get("sym", True):
        return torch.full((*words.shape, _WORD_BITS // bits), 2 ** (bits - 1))
    is_v2 = "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format"))
    ones = sum(1 << shift for shift in range(0, _WORD_BITS, bits))
    return _fields((_unsigned(words) + (0 if is_v2 else ones)) & 0xFFFFFFFF, bits)


def _awq(parts: _Parts, settings: Mapping[str, Any]) -> torch.Tensor:
    scales = parts["scales"]
    bits, groups = 4, scales.shape[0]
    place = torch.tensor(_AWQ_ORDER).argsort()  # of each column of eight

    def columns(words: torch.Tensor) -> torch.Tensor:
        return _fields(_unsigned(words), bits)[..., place].reshape(len(words), -1)

    codes = columns(parts["qweight"]).T
    return _combined(codes, columns(parts["qzeros"]).T, scales.T, _in_place(codes.shape[1], groups))


def _compressed_tensors(parts: _Parts, settings: Mapping[str, Any]) -> torch.Tensor:
    if "weight" in parts and parts["weight"].dtype == torch.float8_e4m3fn:
        return parts["weight"].float() * parts["weight_scale"].float()
    if "weight" in parts:
        codes, scales = parts["weight"].to(torch.int16), parts["weight_scale"]
        zeros = parts.get("weight_zero_point", torch.zeros(scales.shape))
        return _combined(codes, zeros, scales, _in_place(codes.shape[1], scales.shape[1]))
    rows, width = (int(size) for size in parts["weight_shape"])
    words, scales = parts["weight_packed"], parts["weight_scale"]
    bits = next(bits for bits in (4, 8) if -(-width * bits // _WORD_BITS) == words.shape[1])
    codes = _fields(_unsigned(words), bits).reshape(rows, -1)[:, :width]
    zeros = torch.full(scales.shape, 2 ** (bits - 1))
    if "weight_zero_point" in parts:  # packed along its rows
        zeros = _fields(_unsigned(parts["weight_zero_point"]).T, bits).reshape(scales.shape[1], -1).T[:rows]
    group = parts["weight_g_idx"].long() if "weight_g_idx" in parts else _in_place(width, scales.shape[1])
    return _combined(codes, zeros, scales, group)


_UNPACK = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
