"""Packers of quantized checkpoints, written from the formats word by word: what the readers are compared with."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.checkpoints import save_tiny

# Every linear of a decoder whose weight is quantized when a folder is.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Codes:
    """A quantized weight: codes [N, K], zeros [N, G], scales [N, G], and the group of each column [K]."""

    bits: int
    codes: NDArray[np.int64]
    zeros: NDArray[np.int64]
    scales: NDArray[Any]
    groups: NDArray[np.int64]

    @property
    def values(self) -> NDArray[np.float32]:
        """(q - z) * s, in doubles, which hold it exactly."""
        difference = (self.codes - self.zeros[:, self.groups]).astype(np.float64)
        return (difference * self.scales.astype(np.float64)[:, self.groups]).astype(np.float32)


def random_codes(
    n: int,
    k: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    shuffled: bool = False,
    smallest_zero: int = 1,
    scale_dtype: Any = np.float16,
    seed: int = 0,
) -> Codes:
    """Codes over their whole range, zeros too unless they are the middle; `shuffled`: columns in groups by chance."""
    rng = np.random.default_rng(seed)
    size = k if group_size == -1 else group_size
    groups = np.arange(k) // size
    count = k // size
    top = 2**bits
    zeros = np.full((n, count), top // 2) if symmetric else rng.integers(smallest_zero, top, (n, count))
    codes = rng.integers(0, top, (n, k))
    scales = (rng.uniform(0.5, 1.5, (n, count)) / top / k**0.5).astype(scale_dtype)
    return Codes(bits, codes, zeros, scales, rng.permutation(groups) if shuffled else groups)


def word(fields: list[int], bits: int) -> int:
    """Fields in one 32-bit word, the first in the low bits."""
    found = 0
    for place, field in enumerate(fields):
        found += (field % 2**bits) << (bits * place)
    return found


def wrapped(zeros: list[int], bits: int) -> int:
    """v1: each zero less 1, in its field."""
    return word([zero - 1 for zero in zeros], bits)


def borrowed(zeros: list[int], bits: int) -> int:
    """v1 as GPTQModel saves it: 1 taken from each field by one subtraction from the word."""
    return (word(zeros, bits) - word([1] * len(zeros), bits)) % 2**32


def spoiled(zeros: list[int], bits: int) -> int:
    """v1 as AutoGPTQ packs it: -1 as 32 bits, or'ed over the fields above."""
    found = 0
    for place, zero in enumerate(zeros):
        found |= (zero - 1) % 2**32 << (bits * place)
    return found % 2**32


def _int32(words: list[list[int]]) -> NDArray[np.int32]:
    return np.array(words, np.uint32).view(np.int32)


def gptq(weight: Codes, pack_zeros: Callable[[list[int], int], int] = wrapped) -> Parts:
    """Qweight [K * b / 32, N], qzeros [G, N * b / 32], scales [G, N], g_idx [K]."""
    n, k = weight.codes.shape
    fields = 32 // weight.bits
    return {
        "qweight": _int32(
            [
                [word(weight.codes[c, r : r + fields].tolist(), weight.bits) for c in range(n)]
                for r in range(0, k, fields)
            ]
        ),
        "qzeros": _int32(
            [
                [pack_zeros([int(z) for z in zeros[c : c + fields]], weight.bits) for c in range(0, n, fields)]
                for zeros in weight.zeros.T
            ]
        ),
        "scales": np.ascontiguousarray(weight.scales.T),
        "g_idx": weight.groups.astype(np.int32),
    }


def awq(weight: Codes) -> Parts:
    """Qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]: nibble i of a word is column AWQ_ORDER[i] of eight."""

    def packed(rows: NDArray[np.int64]) -> NDArray[np.int32]:
        return _int32([[word([int(row[c + i]) for i in AWQ_ORDER], 4) for c in range(0, len(row), 8)] for row in rows])

    return {
        "qweight": packed(weight.codes.T),
        "qzeros": packed(weight.zeros.T),
        "scales": np.ascontiguousarray(weight.scales.T),
    }


def compressed_tensors(weight: Codes, *, symmetric: bool = True, act_order: bool = False) -> Parts:
    """weight_packed [N, ceil(K * b / 32)], weight_scale [N, G]; zero points packed along N."""
    n, k = weight.codes.shape
    fields = 32 // weight.bits
    parts: Parts = {
        "weight_packed": _int32(
            [[word(row[c : c + fields].tolist(), weight.bits) for c in range(0, k, fields)] for row in weight.codes]
        ),
        "weight_scale": weight.scales,
        "weight_shape": np.array([n, k]),
    }
    if not symmetric:
        parts["weight_zero_point"] = np.ascontiguousarray(
            _int32(
                [
                    [word(zeros[r : r + fields].tolist(), weight.bits) for r in range(0, n, fields)]
                    for zeros in weight.zeros.T
                ]
            ).T
        )
    if act_order:
        parts["weight_g_idx"] = weight.groups.astype(np.int32)
    return parts


def gptq_config(**changed: Any) -> dict[str, Any]:
    """With the keys of Qwen1.5's time, groups of 32; None takes a key out."""
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    return {key: value for key, value in (config | changed).items() if value is not None}


def awq_config(**changed: Any) -> dict[str, Any]:
    """With the keys of Qwen1.5's time, groups of 32; None takes a key out."""
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "modules_to_not_convert": None,
        "version": "gemm",
        "zero_point": True,
    }
    return {key: value for key, value in (config | changed).items() if value is not None or key not in changed}


def compressed_tensors_config(weights: Mapping[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    """As compressed-tensors 0.20 saves it; `weights` changes the only group's."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                    "observer": "minmax",
                }
                | dict(weights or {}),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
    } | changed


# Types that NumPy hasn't: as which bits torch gets them, and its own type.
_NOT_NUMPYS: Mapping[Any, tuple[Any, torch.dtype]] = {
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
}


def load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """A safetensors file by its public package; safetensors.numpy can't load float8_e4m3fn."""

    def array(tensor: torch.Tensor) -> NDArray[Any]:
        for dtype, (bits, torchs) in _NOT_NUMPYS.items():
            if tensor.dtype == torchs:
                return tensor.view(getattr(torch, np.dtype(bits).name)).numpy().view(dtype)
        return tensor.numpy()

    return {name: array(tensor) for name, tensor in load_file(path).items()}


def save_tensors(state: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Writes such a file, as transformers does."""

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        if array.dtype in _NOT_NUMPYS:
            bits, torchs = _NOT_NUMPYS[array.dtype]
            return torch.from_numpy(np.array(array).view(bits)).view(torchs)
        return torch.from_numpy(np.array(array))

    save_file({name: tensor(array).contiguous() for name, array in state.items()}, path, {"format": "pt"})


@dataclass(frozen=True)
class Saved:
    """A quantized folder: its weights as codes and all other tensors, by the name by which readers give them."""

    folder: Path
    weights: Mapping[str, Codes]
    plain: Mapping[str, NDArray[Any]]

    @property
    def safetensors(self) -> Path:
        """The one file of tensors."""
        return self.folder / "model.safetensors"

    def change(self, **changed: NDArray[Any] | None) -> None:
        """Writes other tensors, `__` for a dot; None takes one out."""
        state: dict[str, Any] = load_tensors(self.safetensors)
        state |= {name.replace("__", "."): array for name, array in changed.items()}
        save_tensors({name: array for name, array in state.items() if array is not None}, self.safetensors)

    def configure(self, quantization: Mapping[str, Any] | None, **keys: Any) -> None:
        """Writes another quantization_config, and other keys of config.json."""
        path = self.folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys | {"quantization_config": quantization}))


def save_quantized(
    folder: Path,
    quantization: Mapping[str, Any],
    pack: Callable[[Codes], Parts],
    *,
    make: Callable[..., Codes] = random_codes,
    zero_biases: bool = False,
    names: tuple[str, ...] = PROJECTIONS,
    **config: Any,
) -> Saved:
    """A random tiny model whose linears hold random codes.

    Args:
        folder: to write.
        quantization: quantization_config.
        pack: codes -> tensors by the last segment of their names.
        make: (n, k, seed=...) -> codes.
        zero_biases: every quantized linear without a bias gets one of zeros, as GPTQ packers write them.
        names: last segments of modules that are quantized.
        config: see `tests.checkpoints.tiny_config`.
    """
    state, config_json = _tiny(json.dumps({"layers": 1, "kv_heads": 2} | config))
    plain = dict(state)
    weights: dict[str, Codes] = {}
    packed: Parts = {}
    for seed, name in enumerate(sorted(state)):
        module, _, last = name.rpartition(".")
        if last == "weight" and module.rpartition(".")[2] in names:
            n, k = plain.pop(name).shape
            weights[name] = make(n, k, seed=seed)
            packed |= {f"{module}.{part}": array for part, array in pack(weights[name]).items()}
            if zero_biases:
                plain.setdefault(f"{module}.bias", np.zeros(n, np.float16))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config_json)
    save_tensors(plain | packed, folder / "model.safetensors")
    saved = Saved(folder, weights, plain)
    saved.configure(quantization)
    return saved


@functools.cache
def _tiny(config: str) -> tuple[Mapping[str, NDArray[Any]], str]:
    """A random tiny model's tensors and its config.json, by what `tiny_config` gets."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder), dtype="float16", **json.loads(config))
        return load_tensors(Path(folder) / "model.safetensors"), (Path(folder) / "config.json").read_text()
