"""Remakes saved.json: `python -m tests.golden.make_saved AUTOAWQ` (folder of its unpacked sdist).

Matrices as this project writes them (`exporter.checkpoint.hf.saving`), and what each format's public library makes of
these tensors in fp16. The libraries, and how to get them: `tests.golden.make_quantized`.

A case: `read_by`, `format`, `form` (bits, group_size, has_zero_points), `shape` [N, K], `seed` of `codes_of`, `tensors`
and `values` as in quantized.json.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows
from qwen_aot.exporter.checkpoint.hf.saving.formats import SAVED_FORMATS
from tests.golden.make_quantized import case

PATH = Path(__file__).with_name("saved.json")
K = 32


def codes_of(form: CodeForm, n: int, k: int, seed: int) -> EncodedRows:
    """Codes over their whole range, zero points too, the least and the greatest among them."""
    rng = np.random.default_rng(seed)
    groups, top = k // form.group_size, 2**form.bits
    zeros = rng.integers(0, top, (n, groups)).astype(np.uint8)
    zeros[0], zeros[n // 2], zeros[-1] = 0, 0, top - 1
    scales = (rng.uniform(0.5, 1.5, (n, groups)) / top).astype(np.float16)
    codes = rng.integers(0, top, (n, k)).astype(np.uint8)
    return EncodedRows(form, codes, scales, zeros if form.has_zero_points else None)


def gptqmodel(tensors: dict[str, torch.Tensor], form: CodeForm, n: int, k: int) -> torch.Tensor:
    """By its torch kernel, which converts v1 as it loads it."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    module = TorchLinear(
        bits=form.bits,
        group_size=form.group_size,
        sym=not form.has_zero_points,
        desc_act=False,
        in_features=k,
        out_features=n,
        bias=False,
        register_buffers=True,
    )
    module.load_state_dict(tensors, strict=True)
    module.eval()
    if not form.has_zero_points:
        convert_gptq_v1_to_v2_format_module(module, form.bits, torch.int32)
    module._init_wf_unsqueeze_buffers()
    values: torch.Tensor = module.dequantize_weight().T.to(torch.float16)
    return values


def autoawq(folder: Path, tensors: dict[str, torch.Tensor], form: CodeForm) -> torch.Tensor:
    """By `dequantize_gemm`."""
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    gemm = importlib.import_module("awq.modules.linear.gemm")
    parts = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    values: torch.Tensor = gemm.dequantize_gemm(*parts, form.bits, form.group_size).T
    return values


def compressed_tensors(tensors: dict[str, torch.Tensor], form: CodeForm, k: int) -> torch.Tensor:
    """By its compressor."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    is_row = form.group_size == k
    weights = QuantizationArgs(
        num_bits=form.bits,
        type="int",
        symmetric=not form.has_zero_points,
        strategy="channel" if is_row else "group",
        group_size=None if is_row else form.group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    values: torch.Tensor = PackedQuantizationCompressor.decompress(dict(tensors), scheme)["weight"]
    return values


def made(format_name: str, bits: int, group_size: int, *, zero_points: bool, seed: int) -> dict[str, Any]:
    """One entry of the file."""
    form = CodeForm(bits, group_size, np.dtype(np.float16), zero_points)
    n = 32 if format_name == "awq" else 16
    rows = codes_of(form, n, K, seed)
    tensors = {name: torch.from_numpy(array) for name, array in SAVED_FORMATS[format_name].pack(rows).items()}
    if format_name == "gptq":
        read_by, values = "gptqmodel 7.7.0", gptqmodel(tensors, form, n, K)
    elif format_name == "awq":
        read_by, values = "autoawq 0.2.9", autoawq(Path(sys.argv[1]), tensors, form)
    else:
        version = importlib.metadata.version("compressed-tensors")
        read_by, values = f"compressed-tensors {version}", compressed_tensors(tensors, form, K)
    entry = case(read_by, {}, (n, K), tensors, values)
    del entry["made_by"], entry["quantization_config"]
    return {
        "read_by": read_by,
        "format": format_name,
        "form": [bits, group_size, zero_points],
        "seed": seed,
        **entry,
    }


def main() -> None:
    """Writes the file."""
    cases = [
        made("gptq", 4, 16, zero_points=False, seed=1),
        made("gptq", 8, 16, zero_points=False, seed=2),
        made("gptq", 4, 16, zero_points=True, seed=3),
        made("gptq", 8, 16, zero_points=True, seed=4),
        made("gptq", 4, K, zero_points=True, seed=5),
        made("awq", 4, 16, zero_points=True, seed=6),
        made("awq", 4, K, zero_points=True, seed=7),
        made("compressed-tensors", 4, 16, zero_points=False, seed=8),
        made("compressed-tensors", 8, K, zero_points=False, seed=9),
        made("compressed-tensors", 4, 16, zero_points=True, seed=10),
        made("compressed-tensors", 8, 16, zero_points=True, seed=11),
        made("compressed-tensors", 8, K, zero_points=True, seed=12),
    ]
    PATH.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
