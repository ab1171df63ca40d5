"""Remakes quantized.json: `python -m tests.golden.make_quantized AUTOAWQ AUTOGPTQ` (folders of unpacked packages).

One linear as each public library packs it, and the weight that the same library makes of it in fp16. Made with
GPTQModel 7.7.0 (its sdist unpacked on PYTHONPATH, without its compiled kernels), compressed-tensors 0.20.1, AutoAWQ
0.2.9 and AutoGPTQ 0.7.1, of which files are loaded one by one because their packages import what newer transformers
don't have; torch 2.13.

    pip install --no-deps compressed-tensors==0.20.1
    pip download --no-deps --no-build-isolation --no-binary :all: gptqmodel==7.7.0 autoawq==0.2.9
    pip download --no-deps --python-version 3.11 --only-binary :all: auto-gptq==0.7.1

A case: `made_by`, `quantization_config`, `shape` [N, K], `tensors` (dtype, shape, base64 of little-endian bytes) and
`values` (base64 of fp16 [N, K]), or none where no reader can know them.
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

K, GROUP_SIZE = 32, 16
PATH = Path(__file__).with_name("quantized.json")


def stored(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor as the file has it; bf16 by its bits."""
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    dtype = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.int32": "I32", "torch.int64": "I64"}[
        str(tensor.dtype)
    ]
    return {"dtype": dtype, "shape": list(tensor.shape), "data": base64.b64encode(array.tobytes()).decode()}


def case(
    made_by: str, config: Mapping[str, Any], shape: tuple[int, int], tensors: Mapping[str, torch.Tensor], values: Any
) -> dict[str, Any]:
    """One entry of the file."""
    if values is not None:
        assert tuple(values.shape) == shape
        values = base64.b64encode(values.contiguous().numpy().tobytes()).decode()
    return {
        "made_by": made_by,
        "quantization_config": dict(config),
        "shape": list(shape),
        "tensors": {name: stored(tensor) for name, tensor in tensors.items()},
        "values": values,
    }


def numbers(
    n: int,
    k: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    smallest_zero: int = 0,
    shuffled: bool = False,
    seed: int,
) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A linear on its own grid; its scales [N, G], zeros [N, G] with the least and the greatest, and groups [K]."""
    rng = np.random.default_rng(seed)
    size = k if group_size == -1 else group_size
    groups = np.arange(k) // size
    groups = rng.permutation(groups) if shuffled else groups
    top = 2**bits
    zeros = np.full((n, k // size), top // 2) if symmetric else rng.integers(smallest_zero, top, (n, k // size))
    if not symmetric:
        zeros[0], zeros[n // 2], zeros[-1] = smallest_zero, smallest_zero, top - 1
    scales = (rng.uniform(0.5, 1.5, (n, k // size)) / top).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, top, (n, k))
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = torch.from_numpy(((codes - zeros[:, groups]) * scales[:, groups]).astype(np.float32))
    return linear, torch.from_numpy(scales), torch.from_numpy(zeros.astype(np.float32)), torch.from_numpy(groups).int()


def gptqmodel(bits: int, *, symmetric: bool, v2: bool, shuffled: bool, seed: int) -> dict[str, Any]:
    """Packed by its torch kernel, converted to v1 as it saves it, and dequantized by it."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    n, k, group_size = 16, K, GROUP_SIZE
    linear, scales, zeros, groups = numbers(n, k, bits, group_size, symmetric=symmetric, shuffled=shuffled, seed=seed)
    module = TorchLinear(
        bits=bits, group_size=group_size, sym=symmetric, desc_act=shuffled, in_features=k, out_features=n, bias=False
    )
    module.pack_original(linear, scales, zeros, groups)
    module.eval()
    if not v2:
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=group_size))
    tensors = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    if not v2:
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module._init_wf_unsqueeze_buffers()
    values = module.dequantize_weight().T.to(torch.float16)
    version = importlib.metadata.version("gptqmodel") if _is_installed("gptqmodel") else "7.7.0"
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": shuffled,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "meta": {"quantizer": [f"gptqmodel:{version}"]},
    }
    return case(f"gptqmodel {version}", config, (n, k), tensors, values)


def _is_installed(name: str) -> bool:
    return any(each.metadata["Name"].lower() == name for each in importlib.metadata.distributions())


def autogptq(folder: Path, bits: int, *, symmetric: bool, smallest_zero: int, seed: int) -> dict[str, Any]:
    """Packed by its `cuda-old` kernel, whose PyTorch path multiplies the identity; zeros of 0 it spoils."""
    module_of = load(folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py")
    n, k, group_size = 32, K, GROUP_SIZE  # its tensors are sized by 32 columns
    linear, scales, zeros, _ = numbers(
        n, k, bits, group_size, symmetric=symmetric, smallest_zero=smallest_zero, seed=seed
    )
    module = module_of.QuantLinear(bits, group_size, k, n, False, weight_dtype=torch.float32)
    module.pack(linear, scales, zeros.clone(), None)
    tensors = {
        "qweight": module.qweight,
        "qzeros": module.qzeros,
        "scales": module.scales.half(),
        "g_idx": module.g_idx,
    }
    values = None
    if smallest_zero or symmetric:
        module.scales = module.scales.half()
        values = module(torch.eye(k, dtype=torch.float16)).T
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": False}
    return case("auto-gptq 0.7.1", config, (n, k), tensors, values)


def autoawq(folder: Path, *, seed: int) -> dict[str, Any]:
    """Packed by WQLinear_GEMM, dequantized by `dequantize_gemm`."""
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        package = ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    gemm = importlib.import_module("awq.modules.linear.gemm")
    gemm.get_best_device = lambda: "cpu"
    n, k, group_size = 32, K, GROUP_SIZE  # its tensors are sized by 32 columns
    linear, scales, zeros, _ = numbers(n, k, 4, group_size, symmetric=False, seed=seed)
    module = gemm.WQLinear_GEMM.from_linear(
        linear, 4, group_size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    values = gemm.dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, group_size).T
    tensors = {"qweight": module.qweight, "qzeros": module.qzeros, "scales": module.scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    return case("autoawq 0.2.9", config, (n, k), tensors, values)


def compressed(bits: int, k: int, group_size: int, *, symmetric: bool, seed: int) -> dict[str, Any]:
    """Packed and unpacked by its compressor."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    n = 16
    linear, scales, zeros, _ = numbers(n, k, bits, group_size, symmetric=symmetric, seed=seed)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    tensors = PackedQuantizationCompressor.compress(
        {
            "weight": linear.weight.data,
            "weight_scale": scales.half(),
            "weight_zero_point": (zeros - 2 ** (bits - 1)).to(torch.int8),
        },
        scheme,
    )
    values = PackedQuantizationCompressor.decompress(dict(tensors), scheme)["weight"]
    version = importlib.metadata.version("compressed-tensors")
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return case(f"compressed-tensors {version}", config, (n, k), tensors, values)


def load(path: Path) -> ModuleType:
    """A module by its file, without the package around it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Writes the file."""
    awq_folder, autogptq_folder = (Path(argument) for argument in sys.argv[1:])
    cases = {
        "gptqmodel v1 4 bits": gptqmodel(4, symmetric=True, v2=False, shuffled=False, seed=1),
        "gptqmodel v1 4 bits asymmetric, act-order": gptqmodel(4, symmetric=False, v2=False, shuffled=True, seed=2),
        "gptqmodel v1 8 bits asymmetric": gptqmodel(8, symmetric=False, v2=False, shuffled=False, seed=3),
        "gptqmodel v2 4 bits asymmetric, act-order": gptqmodel(4, symmetric=False, v2=True, shuffled=True, seed=4),
        "gptqmodel v2 8 bits": gptqmodel(8, symmetric=True, v2=True, shuffled=False, seed=5),
        "autogptq 4 bits asymmetric": autogptq(autogptq_folder, 4, symmetric=False, smallest_zero=1, seed=6),
        "autogptq 8 bits": autogptq(autogptq_folder, 8, symmetric=True, smallest_zero=0, seed=7),
        "autogptq 4 bits, zeros of 0": autogptq(autogptq_folder, 4, symmetric=False, smallest_zero=0, seed=8),
        "autoawq": autoawq(awq_folder, seed=9),
        "compressed-tensors 4 bits": compressed(4, K, GROUP_SIZE, symmetric=True, seed=10),
        "compressed-tensors 4 bits asymmetric": compressed(4, K, GROUP_SIZE, symmetric=False, seed=11),
        "compressed-tensors 8 bits, channels": compressed(8, 36, -1, symmetric=True, seed=12),
        "compressed-tensors 8 bits asymmetric": compressed(8, K, GROUP_SIZE, symmetric=False, seed=13),
        "compressed-tensors 4 bits asymmetric, channels": compressed(4, 36, -1, symmetric=False, seed=14),
    }
    PATH.write_text(json.dumps({"cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
