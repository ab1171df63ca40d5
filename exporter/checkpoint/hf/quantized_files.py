"""Checkpoints that another tool quantized: told by their tensors' and files' names where config.json doesn't say so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qwen_aot.errors import CheckpointError

# The last segment of a tensor's name -> the methods that write it.
_TENSORS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_scale_inv": "fp8 (block-wise)",
    "weight_scale": "compressed-tensors, fp8 or ModelOpt",
    "input_scale": "compressed-tensors, fp8 or ModelOpt",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes (int8)",
    "W_q": "HQQ",
}
_PREFIXES = {"bitsandbytes__": "bitsandbytes"}  # of the last segment: quant_state.bitsandbytes__nf4
# Files beside config.json by which older tools say it.
_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
_ACCEPTED = "accepted: the bfloat16, float16 or float32 checkpoint, which the build quantizes itself"


def method_of(names: Iterable[str]) -> tuple[str, str] | None:
    """The method that tensors' names tell, and the first of them; None: they are a plain model's."""
    for name in names:
        last = name.rpartition(".")[2]
        method = _TENSORS.get(last) or next((m for prefix, m in _PREFIXES.items() if last.startswith(prefix)), None)
        if method is not None:
            return method, name
    return None


def refuse_quantized(path: Path, names: Iterable[str]) -> None:
    """Checks tensors' names.

    Raises:
        CheckpointError: they are those of a quantized checkpoint.
    """
    found = method_of(names)
    if found is not None:
        method, name = found
        raise CheckpointError(
            f"{path} is quantized: tensor {name!r} is one that {method} writes; a quantized Hugging Face checkpoint is "
            f"not supported yet; {_ACCEPTED}"
        )


def refuse_quantized_folder(folder: Path) -> None:
    """Checks for the files by which older tools say how they quantized.

    Raises:
        CheckpointError: there is one.
    """
    for name, method in _FILES.items():
        if (folder / name).is_file():
            raise CheckpointError(
                f"{folder} holds {name}: its weights are quantized by {method}; a quantized Hugging Face checkpoint is "
                f"not supported yet; {_ACCEPTED} (if these are plain weights, move {name} away)"
            )
