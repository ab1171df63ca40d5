"""What tensors' names tell of the tool that quantized them, where no configuration says it."""

from __future__ import annotations

from collections.abc import Iterable

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
_ACCEPTED = (
    "accepted: the tensors of the method that config.json's quantization_config names, or the bfloat16, float16 or "
    "float32 checkpoint"
)


def method_of(names: Iterable[str]) -> tuple[str, str] | None:
    """The method that tensors' names tell, and the first of them; None: they are a plain model's."""
    for name in names:
        last = name.rpartition(".")[2]
        method = _TENSORS.get(last) or next((m for prefix, m in _PREFIXES.items() if last.startswith(prefix)), None)
        if method is not None:
            return method, name
    return None


def refuse_quantized(where: object, names: Iterable[str]) -> None:
    """Checks tensors' names, of a checkpoint or of the rest of one.

    Raises:
        CheckpointError: one is that of a quantized checkpoint.
    """
    found = method_of(names)
    if found is not None:
        method, name = found
        raise CheckpointError(
            f"{where}: tensor {name!r} is one that {method} writes, and the configuration doesn't say so; {_ACCEPTED}"
        )
