"""What a format is asked about: the matrices of a model as codes, and names for its configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.checkpoint.hf.quantized.scheme import WHOLE_ROW, Scheme
from qwen_aot.exporter.checkpoint.hf.quantized.words import WORD_BITS
from qwen_aot.exporter.model.tensors import Role

SCALE_DTYPE = np.dtype("<f2")
_WEIGHT = ".weight"
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Modules that serving libraries make one of: they ask a pattern by the name of the whole.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.shared_expert.gate_up_proj": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that is to be stored as codes.

    Attributes:
        name: by which readers give it, `.weight` at its end.
        role: what it is to the model.
        shape: (N, K).
        form: of its codes.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    form: CodeForm

    @property
    def module(self) -> str:
        """The name of the module whose weight it is."""
        return self.name.removesuffix(_WEIGHT)

    @property
    def groups(self) -> int:
        """Of each row."""
        return self.shape[1] // min(self.form.group_size, self.shape[1])

    @property
    def is_whole_row(self) -> bool:
        """Whether a row has one group."""
        return self.form.group_size >= self.shape[1]

    @property
    def packed_bytes(self) -> int:
        """About what its tensors take, in any format."""
        (n, k), bits, groups = self.shape, self.form.bits, self.groups
        words = max(n * -(-k * bits // WORD_BITS), k * -(-n * bits // WORD_BITS))
        return 4 * words + groups * (2 * n + n * bits // 8 + 4) + 4 * k + 16

    def error(self, what: str) -> BuildError:
        """An error about it."""
        return BuildError(f"{self.name} {what}")


def check_matrix(matrix: Matrix, bits: Collection[int], *, fills_words: bool, may_round_inputs: bool = False) -> None:
    """What every format asks for.

    Args:
        matrix: to be stored.
        bits: that the format has.
        fills_words: rows and columns of codes fill 32-bit words.
        may_round_inputs: the format has scales of inputs.

    Raises:
        BuildError: it can't be stored so.
    """
    (n, k), form = matrix.shape, matrix.form
    if form.bits not in bits:
        raise matrix.error(f"has codes of {form.bits} bits; accepted: {', '.join(map(str, bits))}")
    if form.scale_dtype != SCALE_DTYPE:
        raise matrix.error(f"has {form.scale_dtype.name} scales; accepted: float16")
    if form.has_permutation:
        raise matrix.error("has its columns in another order; accepted: their own")
    if form.has_input_scale and not may_round_inputs:
        raise matrix.error("has a scale of its input; accepted: none, or format compressed-tensors")
    if not matrix.is_whole_row and k % form.group_size:
        raise matrix.error(f"has rows of {k}, which groups of {form.group_size} don't divide; accepted: sizes that do")
    if fills_words and (n * form.bits % WORD_BITS or k * form.bits % WORD_BITS):
        raise matrix.error(
            f"has {n} x {k} codes of {form.bits} bits, which don't fill whole 32-bit words; accepted: multiples of "
            f"{WORD_BITS // form.bits} both ways, or format compressed-tensors"
        )


def schemes_of(matrices: Sequence[Matrix]) -> tuple[Scheme, Mapping[Scheme, Sequence[Matrix]]]:
    """The scheme of most matrices, and the other schemes with theirs, in order of first use."""
    counts = Counter(_scheme(matrix) for matrix in matrices if not matrix.is_whole_row)
    counts.update(_scheme(matrix) for matrix in matrices if matrix.is_whole_row and _grouped(matrix) not in counts)
    default = max(counts, key=lambda scheme: counts[scheme])  # the first of those that are as frequent
    others: dict[Scheme, list[Matrix]] = {}
    for matrix in matrices:
        if default not in (_scheme(matrix), _grouped(matrix)):
            others.setdefault(_scheme(matrix), []).append(matrix)
    return default, others


def _scheme(matrix: Matrix) -> Scheme:
    size = WHOLE_ROW if matrix.is_whole_row else matrix.form.group_size
    return Scheme(matrix.form.bits, size, not matrix.form.has_zero_points)


def _grouped(matrix: Matrix) -> Scheme:
    """The scheme by the size of its groups, which may be one group a row."""
    return Scheme(matrix.form.bits, matrix.form.group_size, not matrix.form.has_zero_points)


def patterns(modules: Sequence[str], *, with_fused: bool = False) -> list[str]:
    """Regular expressions that match these modules' whole names and no other's.

    Args:
        modules: names, each once.
        with_fused: also the name of a module that serving libraries make of several, where all of these are there.
    """
    outside, layers_of = [], dict[str, list[str]]()
    for module in modules:
        match = _IN_LAYER.fullmatch(module)
        if match is None:
            outside.append(module)
        else:
            layers_of.setdefault(match[2], []).append(match[1])
    ends_of: dict[tuple[str, ...], list[str]] = {}
    for end, found_in in layers_of.items():
        ends_of.setdefault(tuple(found_in), []).append(end)
    found = [rf"^{re.escape(module)}$" for module in outside]
    for layers, ends in ends_of.items():
        if with_fused:
            ends = ends + [whole for whole, parts in _FUSED.items() if set(parts) <= set(ends)]
        found.append(rf"^model\.layers\.({'|'.join(layers)})\.({'|'.join(map(re.escape, ends))})$")
    return found
