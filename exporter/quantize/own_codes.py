"""How a checkpoint's own codes are stored where they are kept: which tensors make one matrix, and in which blocks.

Codes of fewer bits fit wider ones and groups fit any block that divides them, so that nothing is rounded
(`exporter.quantize.encoded`). Decided from what is known before a weight is read; lowerings and the planner ask here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, Encoding
from qwen_aot.exporter.checkpoint.storage import Storage
from qwen_aot.exporter.quantize.blockwise import BLOCK_SIZES, BlockFormat

TABLE_BLOCK = 32  # of an embedding and a head that are plain numbers, and are quantized on request
EXPERT_BLOCK = 128  # of the QwenMoE plugin (`exporter.graph.plugin_ops`, whose import takes onnx)
# Of the QwenLinear plugin: multiples of K and of N, and blocks by bits.
LINEAR_COLUMNS, LINEAR_ROWS = 128, 16
LINEAR_GROUPS = {4: (32, 64, 128), 8: (128,)}
OFFSET_BYTES = 4  # of a block's offset: fp32
AS_FLOATS = "--precision fp32 or fp16, whose floats are made of the same codes"


def have_codes(names: Sequence[str], storage: Storage) -> bool:
    """Whether all of these tensors are stored as codes that can be read."""
    return all(storage.form(name) is not None for name in names)


def make_one_matrix(names: Sequence[str], storage: Storage) -> bool:
    """Whether tensors that read one input can be stacked.

    All are codes of one type or all are numbers, in one order of columns, and of one input that is rounded or not.
    """
    if len({storage.form(name) is None for name in names}) > 1:
        return False
    if len({storage.input_scales.get(name) for name in names}) > 1:
        return False
    if len({form.code_type for name in names if (form := storage.form(name)) is not None}) > 1:
        return False
    orders = [storage.permutation(name) for name in names]
    found = [order for order in orders if order is not None]
    return not found or (len(found) == len(orders) and all(np.array_equal(found[0], other) for other in found))


def block_format(
    forms: Sequence[CodeForm], width: int, scale_bytes: int, dividing: Sequence[int] = ()
) -> BlockFormat | None:
    """The blocks of the fewest bytes that hold rows of K = `width` codes of all these forms; None: there are none.

    Codes whose inputs are rounded too are no blocks: see `exporter.lowering.rounded_inputs`.

    Args:
        forms: of the matrices that are stored alike.
        width: K.
        scale_bytes: of one stored scale.
        dividing: sizes that whole blocks must make up.
    """
    if any(form.has_input_scale or form.code_type is not CodeType.INTEGER for form in forms):
        return None
    bits = 4 if all(form.bits <= 4 for form in forms) else 8
    symmetric = not any(form.has_zero_points for form in forms)
    has_offsets = any(form.has_offsets for form in forms)
    groups = {form.group_size for form in forms if form.group_size < width}
    # Offsets are added by a product with the sums of the input's blocks, which are whole ones.
    wholes = (*groups, *dividing, width) if has_offsets else (*groups, *dividing)
    sizes = [size for size in BLOCK_SIZES if not any(whole % size for whole in wholes)]
    if not sizes:
        return None

    def row_bytes(size: int) -> tuple[float, int]:
        zero_point_bytes = 0 if symmetric else bits / 8
        block_bytes = size * bits / 8 + scale_bytes + zero_point_bytes + OFFSET_BYTES * has_offsets
        return math.ceil(width / size) * block_bytes, -size

    return BlockFormat(bits, min(sizes, key=row_bytes), symmetric, has_offsets)


@dataclass(frozen=True, slots=True)
class SignedFormat:
    """How TensorRT's graph has a matrix of codes.

    Attributes:
        bits: 4 or 8 of a code, signed, around the middle of its range.
        block_size: elements along K that share a scale; it divides K.
        has_offsets: blocks have zero points beside the middle, or minimums, or the rest of a split.
        is_split: codes of 8 bits in several blocks are two of 4 bits, 16 · high + low + 8: TensorRT has no product that
            reads 8 bits in blocks, and would write the matrix anew at each step.
    """

    bits: int
    block_size: int
    has_offsets: bool
    is_split: bool


def signed_format(forms: Sequence[CodeForm], width: int) -> SignedFormat | None:
    """The largest blocks that hold rows of K = `width` codes of all these forms whole; None: there are none."""
    if any(form.code_type is not CodeType.INTEGER for form in forms):
        return None
    bits = 4 if all(form.bits <= 4 for form in forms) else 8
    groups = {form.group_size for form in forms if form.group_size < width}
    sizes = [size for size in BLOCK_SIZES if not any(whole % size for whole in (*groups, width))]
    if not sizes:
        return None
    is_split = bits == 8 and max(sizes) < width
    has_offsets = is_split or any(form.has_zero_points or form.has_offsets for form in forms)
    return SignedFormat(bits, max(sizes), has_offsets, is_split)


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
    if any(form.has_offsets or form.has_input_scale or form.code_type is not CodeType.INTEGER for form in forms):
        return None
    if hidden_size % EXPERT_BLOCK or intermediate_size % EXPERT_BLOCK:
        return None
    if all(form.bits <= 4 for form in forms):
        return PluginExperts(4, has_zeros) if all(form.group_size % EXPERT_BLOCK == 0 for form in forms) else None
    has_rows = all(form.group_size >= hidden_size for form in gate_up) and all(
        form.group_size >= intermediate_size for form in down
    )
    return PluginExperts(8, has_zeros=False) if has_rows and not has_zeros else None


@dataclass(frozen=True, slots=True)
class PluginLinear:
    """How the QwenLinear plugin has a matrix.

    Attributes:
        bits: 4 or 8 of a code.
        group_size: elements along K that share a scale; None: all of them.
        has_zeros: blocks have zero points, of 4 bits.
    """

    bits: int
    group_size: int | None
    has_zeros: bool = False

    def blocks(self, width: int) -> int:
        """In a row of K = `width` elements."""
        return 1 if self.group_size is None else width // self.group_size


def takes_plugin_linear(heights: Sequence[int], width: int) -> bool:
    """Whether the plugin reads matrices of stacked tensors of so many rows each, K = `width`."""
    return width % LINEAR_COLUMNS == 0 and not any(rows % LINEAR_ROWS for rows in heights)


def plugin_linear(forms: Sequence[CodeForm], heights: Sequence[int], width: int) -> PluginLinear | None:
    """The plugin's form that holds codes of all these forms; None: there is none.

    Args:
        forms: of the stacked tensors.
        heights: their rows.
        width: K.
    """
    if any(form.has_offsets or form.has_input_scale or form.code_type is not CodeType.INTEGER for form in forms):
        return None
    if not takes_plugin_linear(heights, width):
        return None
    bits = 4 if all(form.bits <= 4 for form in forms) else 8
    has_zeros = any(form.has_zero_points for form in forms)
    groups = {form.group_size for form in forms if form.group_size < width}
    if not groups:
        return None if bits == 8 and has_zeros else PluginLinear(bits, None, has_zeros)
    sizes = [size for size in LINEAR_GROUPS[bits] if not any(group % size for group in groups)]
    return PluginLinear(bits, max(sizes), has_zeros) if sizes and not (bits == 8 and has_zeros) else None


def may_hold_scales(stored: DTypeLike, scale_dtype: DTypeLike) -> bool:
    """Whether kernels that take scales in a type can have scales of another without rounding.

    bfloat16 has fewer digits than float16 and a wider range: what lies beyond is refused when it is met (`as_scales`).
    """
    is_shorter = np.dtype(stored).name == "bfloat16" and np.dtype(scale_dtype) == np.float16
    return is_shorter or np.can_cast(stored, scale_dtype)


def require_scales(what: str, forms: Sequence[CodeForm], dtype: DTypeLike) -> None:
    """Refuses codes whose scales kernels don't take.

    Raises:
        ExportError: scales of one of the forms don't fit `dtype`.
    """
    wide = next((form for form in forms if not may_hold_scales(form.scale_dtype, dtype)), None)
    if wide is not None:
        raise ExportError(
            f"{what} has {wide.scale_dtype.name} scales, which {np.dtype(dtype).name} doesn't hold; accepted here: "
            f"float16 and bfloat16 scales; {elsewhere(wide)}"
        )


def elsewhere(form: CodeForm) -> str:
    """What takes any scale of such codes, for messages."""
    return "target cpu takes all of them" if form.code_type is CodeType.INTEGER else f"or {AS_FLOATS}"


def no_blocks(what: str, forms: Sequence[CodeForm], blocks: Sequence[int]) -> ExportError:
    """The error for a matrix whose groups no block holds."""
    return ExportError(
        f"{what} is stored as {_described(forms)}, and what computes it here has blocks of "
        f"{', '.join(map(str, blocks))} elements, none of which holds such groups; accepted: groups that one of them "
        f"divides; or {AS_FLOATS}"
    )


def no_experts(name: str, encoding: Encoding) -> ExportError:
    """The error for experts that are stored as codes, where standard ONNX must compute them."""
    return ExportError(
        f"{name} is stored as {encoding.name}, and standard ONNX has no experts with a checkpoint's own codes; "
        f"accepted: target cpu, target tensorrt with the QwenMoE plugin (--moe plugin), or {AS_FLOATS}"
    )


def no_plugin_experts(name: str, forms: Sequence[CodeForm]) -> ExportError:
    """The error for experts whose codes the QwenMoE plugin has no form for."""
    return ExportError(
        f"{name} and the other experts are stored as {_described(forms)}, and the QwenMoE plugin has 4 bits in blocks "
        f"of {EXPERT_BLOCK}, which the groups, the hidden and the intermediate size must be whole of, and 8 bits with "
        f"one scale a row and no zero points, neither with minimums; accepted: one of these, target cpu, or {AS_FLOATS}"
    )


def no_expert_minimums(what: str, forms: Sequence[CodeForm]) -> ExportError:
    """The error for experts whose codes have minimums, which ONNX Runtime's kernel doesn't add."""
    return ExportError(
        f"{what} are stored as {_described(forms)}, and ONNX Runtime's QMoE has no minimums; accepted: types without "
        f"them (Q8_0, Q4_0, Q5_0, Q6_K); or leave --own-codes out, which quantizes anew"
    )


def _described(forms: Sequence[CodeForm]) -> str:
    return ", ".join(
        dict.fromkeys(
            f"{form.kind} in groups of {form.group_size}{' with minimums' if form.has_offsets else ''}"
            f"{' whose inputs are rounded too' if form.has_input_scale else ''}"
            for form in forms
        )
    )
