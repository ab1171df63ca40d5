"""QuantizeSpec: what a user asks `quantize` for, validated once, and the codes that each matrix gets by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import Role, Tensor, WeightClass, checkpoint_tensors
from qwen_aot.exporter.rounding.algorithms import ALGORITHMS, DEFAULT_ALGORITHM, Algorithm

FORMATS = ("compressed-tensors", "gptq", "awq")  # the default first
GROUP_SIZES = (16, 32, 64, 128, 256)
_BITS = (4, 8)
_GROUP_SIZE = 64
_TABLE_BITS = (16, 8, 4)
_ROUNDED = frozenset({WeightClass.PROJECTION, WeightClass.DOWN, WeightClass.EXPERT})
_MOST_TOKENS = 1 << 24
SCALE_DTYPE = np.dtype(np.float16)
SENSITIVE_GROUP = 32  # of matrices that have more bits than the others, and of tables
_PLAIN_SHARE, _MOST_PLAIN = 0.15, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSpec:
    """One request.

    Attributes:
        algorithm: a name of `ALGORITHMS`.
        format: of the folder, one of FORMATS.
        bits: 4 or 8 of most matrices; None: 4, or 8 where inputs are rounded too.
        group_size: elements along K that share a scale, at most: where it doesn't divide K, the largest half of it,
            a quarter … that does. None: 64, or where inputs are rounded too, whole rows.
        symmetric: without zero points; None: unless the format always has them.
        sensitive_bits: of down projections; None: 8 where the format can mix, which groups of 32 then share a scale.
        table_bits: of embedding and head; 16: plain numbers, as a build may round them then.
        bits_per_weight: None, or what all rounded matrices may take on average, with scales and zero points: each gets
            the bits and groups by which the whole loses least.
        plain_share: where inputs are rounded too, what share of the rounded matrices' weights may stay plain: those
            whose inputs lose most; None: 0.15 there.
        tokens: of sample texts that are looked at.
        sequence_length: positions of each piece of them.
        seed: of the drawing of pieces.

    Raises:
        BuildError: a value isn't accepted, or two don't go together.
    """

    algorithm: str = DEFAULT_ALGORITHM
    format: str = FORMATS[0]
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    sensitive_bits: int | None = None
    table_bits: int = 16
    bits_per_weight: float | None = None
    plain_share: float | None = None
    tokens: int = 16384
    sequence_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        _require("algorithm", self.algorithm, tuple(ALGORITHMS))
        _require("format", self.format, FORMATS)
        if self.how.rounds_inputs:
            self._check_rounded_inputs()
            return
        object.__setattr__(self, "bits", self.bits or _BITS[0])
        object.__setattr__(self, "group_size", self.group_size or _GROUP_SIZE)
        _require("bits", self.bits, _BITS)
        _require("group_size", self.group_size, GROUP_SIZES)
        _require("table_bits", self.table_bits, _TABLE_BITS)
        if self.plain_share is not None:
            raise BuildError(
                f"plain_share is of algorithms that round inputs too ({', '.join(_rounding_inputs())}), and algorithm "
                f"is {self.algorithm}; accepted there: bits_per_weight"
            )
        is_awq = self.format == "awq"
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", not is_awq)
        if self.sensitive_bits is None:
            mixes = self.bits == 4 and not is_awq and self.bits_per_weight is None
            object.__setattr__(self, "sensitive_bits", 8 if mixes else self.bits)
        _require("sensitive_bits", self.sensitive_bits, _BITS)
        if is_awq:
            self._check_awq()
        if self.table_bits != 16 and self.format != "compressed-tensors":
            raise BuildError(
                f"format {self.format} has no codes of an embedding, and table_bits is {self.table_bits}; accepted: "
                "16, or format compressed-tensors"
            )
        if self.bits_per_weight is not None and not self.how.uses_texts:
            raise BuildError(
                f"bits_per_weight is chosen by what texts show, and algorithm {self.algorithm} looks at none; "
                f"accepted: {', '.join(name for name, row in ALGORITHMS.items() if row.uses_texts)}"
            )
        if self.bits_per_weight is not None and not 4 < self.bits_per_weight <= 9:
            raise BuildError(
                f"bits_per_weight is {self.bits_per_weight}; accepted: more than 4 (codes of 4 bits and their scales "
                "take at least 4.13) and at most 9"
            )
        self._check_texts()

    def _check_texts(self) -> None:
        for name, least in (("tokens", self.sequence_length), ("sequence_length", 16), ("seed", 0)):
            if getattr(self, name) < least:
                raise BuildError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.tokens > _MOST_TOKENS:
            raise BuildError(f"tokens is {self.tokens}; accepted: at most {_MOST_TOKENS}")

    @property
    def measures(self) -> bool:
        """Whether what each matrix loses is measured before any is rounded."""
        return self.bits_per_weight is not None or bool(self.plain_share)

    @property
    def how(self) -> Algorithm:
        """What the algorithm does."""
        return ALGORITHMS[self.algorithm]

    def request(self) -> Mapping[str, Any]:
        """The options as plain JSON values: two jobs with the same ones make the same folder."""
        return asdict(self)

    def forms(self, config: ModelConfig) -> dict[str, CodeForm]:
        """The codes of every matrix that is rounded, by its tensor's name; without a budget.

        Raises:
            BuildError: no group divides the rows of a matrix.
        """
        found = {}
        code_type = self.how.rounds_inputs
        for tensor in self.rounded(config):
            if code_type is not None:
                width = tensor.shape[1]
                found[tensor.name] = CodeForm(8, width, SCALE_DTYPE, has_input_scale=True, code_type=code_type)
                continue
            is_down = tensor.role.weight_class is WeightClass.DOWN
            bits = self.sensitive_bits if is_down else self.bits
            assert bits is not None and self.group_size is not None  # by __post_init__
            size = min(self.group_size, SENSITIVE_GROUP) if bits != self.bits else self.group_size
            found[tensor.name] = self.form_of(tensor, bits, size)
        return found

    def rounded(self, config: ModelConfig) -> list[Tensor]:
        """The matrices inside the layers that may be rounded; where inputs are too, no experts: no engine has those."""
        every = rounded_tensors(config)
        if not self.how.rounds_inputs:
            return every
        return [tensor for tensor in every if tensor.role.weight_class is not WeightClass.EXPERT]

    def table_forms(self, config: ModelConfig) -> dict[str, CodeForm]:
        """The codes of embedding and head; empty: they stay plain numbers."""
        if self.table_bits == 16:
            return {}
        return {
            tensor.name: self.form_of(tensor, self.table_bits, SENSITIVE_GROUP)
            for tensor in checkpoint_tensors(config)
            if tensor.role in (Role.EMBEDDING, Role.HEAD)
        }

    def form_of(self, tensor: Tensor, bits: int, group_size: int) -> CodeForm:
        """Codes of so many bits, in groups of at most so many elements.

        Raises:
            BuildError: no group divides the rows.
        """
        width = tensor.shape[1]
        size = next((size for size in reversed(GROUP_SIZES) if size <= group_size and width % size == 0), None)
        if size is None:
            raise BuildError(
                f"{tensor.name} has rows of {width}, which no group of {', '.join(map(str, GROUP_SIZES))} elements up "
                f"to {group_size} divides; a build can quantize it in blocks of its own (build-engine --precision int4)"
            )
        return CodeForm(bits, size, SCALE_DTYPE, has_zero_points=not self.symmetric)

    def _check_rounded_inputs(self) -> None:
        """Rounded inputs go with one kind of codes: 8 bits, a scale a row, in compressed-tensors' files."""
        accepted: Mapping[str, tuple[Any, ...]] = {
            "format": (FORMATS[0],),
            "bits": (None, 8),
            "group_size": (None,),
            "symmetric": (None, True),
            "sensitive_bits": (None,),
            "table_bits": (16,),
            "bits_per_weight": (None,),
        }
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                given = " or ".join(str(value) for value in values if value is not None)
                raise BuildError(
                    f"algorithm {self.algorithm} rounds to 8 bits with a scale a row, and {name} is "
                    f"{getattr(self, name)}; accepted: {given or 'nothing'}, or another algorithm "
                    f"({', '.join(name for name, row in ALGORITHMS.items() if not row.rounds_inputs)})"
                )
        object.__setattr__(self, "bits", 8)
        object.__setattr__(self, "symmetric", True)
        share = _PLAIN_SHARE if self.plain_share is None else self.plain_share
        if not 0 <= share <= _MOST_PLAIN:
            raise BuildError(f"plain_share is {share}; accepted: 0 to {_MOST_PLAIN}")
        object.__setattr__(self, "plain_share", share)
        self._check_texts()

    def _check_awq(self) -> None:
        """AWQ's files have one kind of codes: 4 bits with zero points."""
        wrong = {
            "bits": (self.bits, 4),
            "symmetric": (self.symmetric, False),
            "sensitive_bits": (self.sensitive_bits, 4),
            "bits_per_weight": (self.bits_per_weight, None),
        }
        for name, (found, accepted) in wrong.items():
            if found != accepted:
                raise BuildError(
                    f"format awq has 4 bits with zero points in one size of groups, and {name} is {found}; accepted: "
                    f"{accepted}, or another format ({', '.join(FORMATS)})"
                )


def bits_of(form: CodeForm, shape: tuple[int, ...]) -> int:
    """What a matrix [N, K] takes as codes: these, scales and zero points."""
    rows, width = shape
    groups = -(-width // form.group_size)
    per_group = 8 * form.scale_dtype.itemsize + (form.bits if form.has_zero_points else 0)
    return rows * (width * form.bits + groups * per_group)


def rounded_tensors(config: ModelConfig) -> list[Tensor]:
    """Every matrix inside the layers that is rounded: projections and experts, but not routers and gates."""
    return [tensor for tensor in checkpoint_tensors(config) if tensor.role.weight_class in _ROUNDED]


def _rounding_inputs() -> list[str]:
    return [name for name, row in ALGORITHMS.items() if row.rounds_inputs]


def _require(name: str, found: object, accepted: tuple[object, ...]) -> None:
    if found not in accepted:
        raise BuildError(f"{name} is {found!r}; accepted: {', '.join(map(str, accepted))}")
