"""Which tensors of a folder make one quantized linear, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from qwen_aot.errors import CheckpointError
from qwen_aot.exporter.checkpoint.base import TensorInfo
from qwen_aot.exporter.checkpoint.hf.quantized.linear import E4M3, INT8, INT32, INT64, StoredLinear
from qwen_aot.exporter.checkpoint.hf.quantized.settings import Quantization
from qwen_aot.exporter.checkpoint.hf.quantized.tensor_names import refuse_quantized

Parts = Mapping[str, TensorInfo]  # last segment of a name -> the tensor
View = Callable[[TensorInfo], NDArray[Any]]
WEIGHT, BIAS = ".weight", ".bias"


def collect(stored: Mapping[str, TensorInfo], quantization: Quantization) -> Mapping[str, Parts]:
    """Each quantized module's tensors, by the module's name in the files.

    Raises:
        CheckpointError: there is none, a module also has a plain weight, the configuration says that it isn't
            quantized, or another tensor is one of another method, or of codes.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in stored.items():
        module, _, last = name.rpartition(".")
        if last in quantization.format.parts:
            modules.setdefault(module, {})[last] = info
    if not modules:
        raise CheckpointError(
            f"{quantization.where}: the weights are quantized by {quantization.name}, and no tensor is; accepted: "
            f"tensors called {', '.join(sorted(quantization.format.parts))}, or plain weights and no such file"
        )
    for module, parts in modules.items():
        weight = stored.get(module + WEIGHT)
        if weight is not None and weight.dtype in quantization.format.weight_dtypes:
            parts["weight"] = weight
        elif weight is not None:
            raise CheckpointError(f"{module} has a plain weight and {', '.join(sorted(parts))}; accepted: one of them")
        why = quantization.settings.why_plain(module)
        if why is not None:
            raise CheckpointError(f"{module} has {', '.join(sorted(parts))}, although {why}: which is right?")
    taken = {info.name for parts in modules.values() for info in parts.values()}
    rest = {name: info for name, info in stored.items() if name not in taken}
    refuse_quantized(quantization.where, rest)
    for name, info in rest.items():
        if info.dtype in (INT8, INT32, INT64, E4M3):
            raise CheckpointError(
                f"tensor {name} has dtype {info.dtype.name}; accepted: floating point of 16 bits or more"
            )
    return modules


def stored_linear(
    module: str, weights: Sequence[str], parts: Parts, shapes: Mapping[str, tuple[int, ...]], view: View
) -> StoredLinear:
    """One module's tensors with the shape that the model's configuration gives its weight.

    Args:
        module: its name in the files.
        weights: the names by which what its weight holds is given, rows behind each other.
        parts: its tensors.
        shapes: of the model's linears that may be quantized, by that name.
        view: maps a tensor.

    Raises:
        CheckpointError: the model has no such linear.
    """
    found = [shapes.get(weight, ()) for weight in weights]
    if any(len(shape) != 2 or shape[1] != found[0][1] for shape in found):
        raise CheckpointError(
            f"{module} is quantized ({', '.join(sorted(parts))}), and no linear of this model; accepted: its "
            "projections, experts, and a head that isn't the embedding"
        )
    return StoredLinear(module, weights[0], (sum(shape[0] for shape in found), found[0][1]), parts, view)


def placeholder_biases(
    linears: Collection[StoredLinear], stored: Mapping[str, TensorInfo], of_model: Collection[str], view: View
) -> set[str]:
    """Names of biases that the model lacks and that hold zeros: GPTQ packers give every linear one.

    Args:
        linears: all that are quantized.
        stored: the tensors by their names in the files.
        of_model: the names in the files of tensors that the model has.
        view: maps a tensor.

    Returns:
        Names in the files.

    Raises:
        CheckpointError: one of them holds something else.
    """
    found = set()
    for linear in linears:
        name = linear.name + BIAS
        if name not in stored or name in of_model:
            continue
        if stored[name].shape != linear.shape[:1]:
            raise linear.error("bias", f"has shape {list(stored[name].shape)}; accepted: {[linear.shape[0]]}")
        if (view(stored[name]) != 0).any():
            raise linear.error(
                "bias", "isn't zero, and the model has no bias there; accepted: zeros, which change nothing"
            )
        found.add(name)
    return found
