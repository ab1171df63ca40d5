"""Program texts as TensorRT-RTX 1.7.1 writes them into its engines, for tests that need one without a compiler."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def packed(text: str) -> bytes:
    """A text as an engine file holds it: the magic word, a version, the length."""
    body = text.encode()
    return b"NLYM" + struct.pack("<IQ", 0x1EDAA1, len(body)) + body


def program(tensors: Sequence[str], lines: Sequence[str], *, is_step: bool) -> str:
    """A whole text. A step's also computes its shapes."""
    text = "header {\n  version = 5\n}\ndescriptors {\n" + "".join(f"{line}\n" for line in tensors)
    text += "}\nmain {\n" + "".join(f"{line}\n" for line in lines) + "}\n"
    return text + "\nshape_main {\n label bb9: \n}\n" if is_step else text


def tensor(name: str, dims: str, dtype: str, *, host: bool = False) -> str:
    """A line of `descriptors`; dims with their braces."""
    memory = "mem_prop=100 " if host else "mem_prop=0 "
    return (
        f'  tensor={{ alignment=128 dims={dims} {memory}name="{name}" offset=0 rank0=0 region="" '
        f"stride_order={{ 0 }} strides={{ 1 }} type={dtype} }}"
    )


def constant(name: str, dims: str, dtype: str, stored: int, *, place: int) -> str:
    """The same of a constant, by which others of the same place are the same bytes."""
    return (
        f'  tensor={{ alignment=128 const_payload_size={stored} dims={dims} name="{name}" offset={place} rank0=0 '
        f"region=__mye7-consts stride_order={{ 0 }} strides={{ 1 }} type={dtype} }}"
    )


def function(name: str, inputs: Sequence[str], outputs: Sequence[str], layers: str = "") -> str:
    """A kernel of its own."""
    read, written = (" ".join(f'"{name}"' for name in names) for names in (inputs, outputs))
    return (
        f"  function={{ name={name} fqn={name}_0x1 args={{ {read} {written} }} input_args={{ {read} }} "
        f"shape_args_count=0 output_args={{ {written} }} kernel_kind=1 binary = 0 grid = {{ 1 1 1 }} "
        f'tile_dims={{}} cond_fqn = {{ exec_cond = "c" function = {name}_com grid = {{ 1 1 1 }} }} '
        f'layers="{layers}" swap_ab=false }}'
    )


def product(name: str, left: str, right: str, output: str, layers: str = "") -> str:
    """A matrix product by a library's kernel."""
    return (
        f'  fully_connected={{ name="{name}" output={{"{output}" }} input={{"{left}" "{right}" }} stream=0 trA=false '
        f'alpha=3F800000 kernel=__myelin_CASK_STUB source=cask5 layers="{layers}" }}'
    )


def fusion(name: str, number: int, inputs: Sequence[str], outputs: Sequence[str], layers: str = "") -> str:
    """A kernel that computes the `number`-th of the programs behind the step's."""
    read, written = (" ".join(f'"{name}"' for name in names) for names in (inputs, outputs))
    return (
        f"  runtime_fusion={{ name={name} input_args={{ {read} }} output_args={{ {written} }} binary={number} "
        f'scratchspace={{"s" }} stream=0 layers="{layers}" backbone=gemm }}'
    )
