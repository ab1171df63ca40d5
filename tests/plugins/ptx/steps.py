"""Steps whose launches are executed from PTX, without the library: `plugins.launch` makes the launches.

What a fault in the PTX does is seen this way, since the driver's double executes the PTX of its cubins and no other.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.plugins.any_step import Step
from tests.plugins.ptx.interpreter import Counts, Interpreter, Range, pointers

_ALIGNMENT = 256  # of the driver's allocations
_GAP = 1 << 16  # bytes


class CompiledSteps:
    """Executes steps from the PTX of one SM."""

    def __init__(self, interpreter: Interpreter, *kernels: Path) -> None:
        """Takes folders of one SM, as `plugins.aot` wrote them."""
        self._interpreter = interpreter
        self._folders: dict[str, Path] = {}  # by variant, and so are the entries
        self._entries: dict[str, dict[str, Any]] = {}
        for folder in kernels:
            for entry in json.loads((folder / "manifest.json").read_bytes())["variants"]:
                self._folders[entry["name"]], self._entries[entry["name"]] = folder, entry

    @property
    def variants(self) -> set[str]:
        """Names of those that the folders have."""
        return set(self._entries)

    def text(self, variant: str) -> str:
        """The PTX of a variant."""
        return (self._folders[variant] / f"{variant}.ptx").read_text()

    def run(self, step: Step, texts: dict[str, str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
        """The tensors after a step, and what each variant's launch did.

        Args:
            step: What to compute, with the tiles of this SM.
            texts: PTX by variant, instead of that in its folder.

        Raises:
            PtxError: What a kernel may not do.
        """
        tensors, launches = step.prepare(torch.device("cpu"))
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        present = _apart(given)
        moved = {given[name].data_ptr(): tensor for name, tensor in present.items()}
        ranges = [
            Range(name, tensor.data_ptr(), tensor.numel() * tensor.element_size()) for name, tensor in present.items()
        ]
        counts = {}
        for launch in launches:
            variant = launch.variant
            entry = self._entries[variant.name]
            values = [_value(argument.type, launch.arguments[argument.name], moved) for argument in variant.arguments]
            module = self._interpreter.load((texts or {}).get(variant.name) or self.text(variant.name))
            counts[variant.name] = module.launch(
                entry["symbol"],
                grid=variant.grid(launch.sizes),
                threads=32 * entry["num_warps"],
                parameters=pointers([*values, ctypes.c_void_p(), ctypes.c_void_p()]),
                ranges=ranges,
                shared_bytes=entry["shared_bytes"],
            )
        return present, counts


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that lie far from each other, so that what goes beyond the end of one isn't in the next."""
    places, size = {}, _GAP
    for name, tensor in tensors.items():
        places[name], size = size, size + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT + _GAP
    memory = torch.zeros(size + _ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % _ALIGNMENT
    copies = {}
    for name, tensor in tensors.items():
        at = start + places[name]
        copies[name] = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies[name].copy_(tensor)
    return copies


def _value(kind: str, argument: Any, moved: Mapping[int, torch.Tensor]) -> Any:
    if kind == "fp32":
        return ctypes.c_float(argument)
    if kind == "i32":
        return ctypes.c_int32(argument)
    return ctypes.c_void_p(0 if argument is None else moved[argument.data_ptr()].data_ptr())
