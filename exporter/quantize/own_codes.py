"""How a checkpoint's own codes are stored where they are kept: which tensors make one matrix, and in which blocks.

Codes of fewer bits fit wider ones and groups fit any block that divides them, so that nothing is rounded
(`exporter.quantize.encoded`). Decided from what is known before a weight is read; lowerings and the planner ask here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, Encoding
from qwen_aot.exporter.checkpoint.storage import Storage
from qwen_aot.exporter.quantize.blockwise import BLOCK_SIZES, BlockFormat

TABLE_BLOCK = 32  # of an embedding and a head that are plain numbers, and are quantized on request
EXPERT_BLOCK = 128  # of the QwenMoE plugin (`exporter.graph.plugin_ops`, whose import takes onnx)
AS_FLOATS = "--precision fp32 or fp16, whose floats are made of the same codes"


def have_codes(names: Sequence[str], storage: Storage) -> bool:
    """Whether all of these tensors are stored as codes that can be read."""
    return all(storage.form(name) is not None for name in names)


def make_one_matrix(names: Sequence[str], storage: Storage) -> bool:
    """Whether tensors that read one input can be stacked: all as codes or all as numbers, in one order of columns."""
    if len({storage.form(name) is None for name in names}) > 1:
        return False
    orders = [storage.permutation(name) for name in names]
    found = [order for order in orders if order is not None]
    return not found or (len(found) == len(orders) and all(np.array_equal(found[0], other) for other in found))


def block_format(
    forms: Sequence[CodeForm], width: int, scale_bytes: int, dividing: Sequence[int] = ()
) -> BlockFormat | None:
    """The blocks of the fewest bytes that hold rows of K = `width` codes of all these forms; None: there are none.

    Args:
        forms: of the matrices that are stored alike.
        width: K.
        scale_bytes: of one stored scale.
        dividing: sizes that whole blocks must make up.
    """
    bits = 4 if all(form.bits <= 4 for form in forms) else 8
    symmetric = not any(form.has_zero_points for form in forms)
    groups = {form.group_size for form in forms if form.group_size < width}
    sizes = [size for size in BLOCK_SIZES if not any(whole % size for whole in (*groups, *dividing))]
    if not sizes:
        return None

    def row_bytes(size: int) -> tuple[float, int]:
        zero_point_bytes = 0 if symmetric else bits / 8
        return math.ceil(width / size) * (size * bits / 8 + scale_bytes + zero_point_bytes), -size

    return BlockFormat(bits, min(sizes, key=row_bytes), symmetric)


@dataclass(frozen=True, slots=True)
class SignedFormat:
    """How TensorRT's graph has a matrix of codes.

    Attributes:
        bits: 4 or 8 of a code, signed, around the middle of its range.
        block_size: elements along K that share a scale; it divides K.
        has_offsets: blocks have zero points beside the middle.
    """

    bits: int
    block_size: int
    has_offsets: bool


def signed_format(forms: Sequence[CodeForm], width: int) -> SignedFormat | None:
    """The largest blocks that hold rows of K = `width` codes of all these forms whole; None: there are none."""
    bits = 4 if all(form.bits <= 4 for form in forms) else 8
    groups = {form.group_size for form in forms if form.group_size < width}
    sizes = [size for size in BLOCK_SIZES if not any(whole % size for whole in (*groups, width))]
    return SignedFormat(bits, max(sizes), any(form.has_zero_points for form in forms)) if sizes else None


@dataclass(frozen=True, slots=True)
class PluginExperts:
    """How the QwenMoE plugin has all routed experts of a model.

    Attributes:
        bits: 4, in blocks of EXPERT_BLOCK; or 8, with a scale a row.
        has_zeros: blocks have zero points.
    """

    bits: int
    has_zeros: bool


def plugin_experts(
    gate_up: Sequence[CodeForm], down: Sequence[CodeForm], hidden_size: int, intermediate_size: int
) -> PluginExperts | None:
    """The plugin's form that holds codes of all these forms; None: there is none."""
    forms = (*gate_up, *down)
    has_zeros = any(form.has_zero_points for form in forms)
    if hidden_size % EXPERT_BLOCK or intermediate_size % EXPERT_BLOCK:
        return None
    if all(form.bits <= 4 for form in forms):
        return PluginExperts(4, has_zeros) if all(form.group_size % EXPERT_BLOCK == 0 for form in forms) else None
    has_rows = all(form.group_size >= hidden_size for form in gate_up) and all(
        form.group_size >= intermediate_size for form in down
    )
    return PluginExperts(8, has_zeros=False) if has_rows and not has_zeros else None


def no_blocks(what: str, forms: Sequence[CodeForm], blocks: Sequence[int]) -> ExportError:
    """The error for a matrix whose groups no block holds."""
    found = ", ".join(dict.fromkeys(f"{form.bits} bits in groups of {form.group_size}" for form in forms))
    return ExportError(
        f"{what} is stored as {found}, and what computes it here has blocks of {', '.join(map(str, blocks))} elements, "
        f"none of which holds such groups; accepted: groups that one of them divides; or {AS_FLOATS}"
    )


def no_experts(name: str, encoding: Encoding) -> ExportError:
    """The error for experts that are stored as codes, where standard ONNX must compute them."""
    return ExportError(
        f"{name} is stored as {encoding.name}, and standard ONNX has no experts with a checkpoint's own codes; "
        f"accepted: target cpu, target tensorrt with the QwenMoE plugin (--moe plugin), or {AS_FLOATS}"
    )


def no_plugin_experts(name: str, forms: Sequence[CodeForm]) -> ExportError:
    """The error for experts whose codes the QwenMoE plugin has no form for."""
    found = ", ".join(dict.fromkeys(f"{form.bits} bits in groups of {form.group_size}" for form in forms))
    return ExportError(
        f"{name} and the other experts are stored as {found}, and the QwenMoE plugin has 4 bits in blocks of "
        f"{EXPERT_BLOCK}, which the groups, the hidden and the intermediate size must be whole of, and 8 bits with one "
        f"scale a row and no zero points; accepted: one of these, target cpu, or {AS_FLOATS}"
    )
