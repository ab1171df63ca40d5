"""Quantized weights of one graph: initializers and recipes for codes, scales and zero points, made on first use.

A weight is quantized from floats, unless all tensors that it is made of are stored as codes which fit the format: then
these are kept (`exporter.quantize.encoded`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.exporter.checkpoint.encoding import Arrange, EncodedRows, arranged, dequantize, stack
from qwen_aot.exporter.quantize.blockwise import BlockFormat, Quantized, pack, quantize, quantize_channels
from qwen_aot.exporter.quantize.encoded import as_blocks, as_scales, in_form_of, may_overflow, nearest_scales, obstacle
from qwen_aot.exporter.quantize.formats import Formats
from qwen_aot.exporter.weights.recipe import Arrays, Output, Recipe, Traced


class _Rows(Protocol):
    """Rows of a weight, in the kernel's order, as its initializers are made of them."""

    @property
    def values(self) -> NDArray[np.float32]:
        """[r, K], without the offsets of blocks."""

    @property
    def blocks(self) -> Quantized:
        """The same rows in blocks."""


@dataclass(frozen=True)
class _FloatRows:
    values: NDArray[np.float32]
    layout: BlockFormat
    scale_type: ir.DataType

    @cached_property
    def blocks(self) -> Quantized:
        return quantize(self.values, self.layout, self.scale_type.numpy())


@dataclass(frozen=True)
class _CodedRows:
    rows: EncodedRows
    layout: BlockFormat

    @cached_property
    def values(self) -> NDArray[np.float32]:
        return dequantize(replace(self.rows, offsets=None))

    @cached_property
    def blocks(self) -> Quantized:
        return as_blocks(self.rows, self.layout)


Pick = Callable[[_Rows], NDArray[np.generic]]  # one part


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """Initializers of one weight, and how it was quantized; no zero points where it is symmetric.

    Attributes:
        offsets: fp32, of the format's blocks: of a matrix [n, N], of a table [V, n]; None: it has none.
    """

    layout: BlockFormat
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    offsets: ir.Value | None = None


@dataclass(slots=True)
class _Entry:
    """How one weight is quantized, and what is kept of it."""

    recipe: Recipe  # of the float weight
    keeps_codes: bool
    arrange: Arrange
    layout: BlockFormat
    scale_type: ir.DataType
    rows_per_group: int
    outputs: list[Output] = field(default_factory=list)
    picks: list[Pick] = field(default_factory=list)

    def quantized_recipe(self) -> Recipe:
        inner, arrange, layout, picks = self.recipe.transform, self.arrange, self.layout, tuple(self.picks)
        scale_type = self.scale_type

        def transform(rows: NDArray[np.float32]) -> Arrays:
            made = _FloatRows(arrange(inner(rows)[0].astype(np.float32, copy=False), 0), layout, scale_type)
            return tuple(pick(made) for pick in picks)

        def from_codes(parts: Sequence[EncodedRows]) -> Arrays:
            rows = stack([in_form_of(layout, part) for part in parts])
            if may_overflow(rows):
                inner(dequantize(rows))  # refuses values that the compute type can't hold
            dtype = scale_type.numpy()
            as_scales(nearest_scales(rows.scales, dtype, lambda: rows.form.largest_number), dtype)
            made = _CodedRows(arranged(rows, arrange), layout)
            return tuple(pick(made) for pick in picks)

        return Recipe(
            self.recipe.sources,
            tuple(self.outputs),
            transform,
            self.rows_per_group,
            from_codes if self.keeps_codes else None,
        )


@dataclass(frozen=True, slots=True)
class ChannelWeight:
    """Initializers of a weight with one scale an output channel."""

    codes: ir.Value
    scales: ir.Value


class QuantizedWeights:
    """Turns weights of `traced` into quantized ones. A weight with two users (a tied embedding) is stored once.

    The layouts are those of ONNX Runtime's kernels, with n = ceil(K / block_size) blocks a row:

    | | codes | scales | zero points |
    | --- | --- | --- | --- |
    | matrix [N, K] (MatMulNBits) | [N, n, bytes] | [N, n] | [N, ceil(n * bits / 8)], packed |
    | table [V, M] (GatherBlockQuantized) | the matrix's | the matrix's | [V, n, 1], one a byte |
    | experts [E, N, K] (QMoE) | [E, N, n * bytes] | [E, N, n] | [E, N, ceil(n * bits / 8)], packed |
    | channels [N, K] (MatMulIntegerToFloat) | [K, N] int8 | [N] | none |
    """

    def __init__(
        self,
        traced: Traced,
        formats: Formats,
        scale_type: ir.DataType = ir.DataType.FLOAT,
    ) -> None:
        """Nothing is quantized yet.

        Args:
            traced: its recipes and initializers are replaced as weights are asked for.
            formats: of each weight.
            scale_type: of scales, but not those of channels: the compute type, which the kernels want.
        """
        self._traced = traced
        self._formats = formats
        self._scale_type = scale_type
        self._entries: dict[str, _Entry] = {}

    def _format_of(self, weight: ir.Value) -> BlockFormat | None:
        name = str(weight.name)
        if name in self._entries:
            return self._entries[name].layout
        return self._formats.matrix(name, self._traced.recipes[name])

    def experts_format(self, gate_up: ir.Value, down: ir.Value) -> BlockFormat | None:
        """Of both matrices of experts [E, N, K]; None: they aren't quantized."""
        recipes = self._traced.recipes
        return self._formats.experts(recipes[str(gate_up.name)], recipes[str(down.name)], dims(gate_up)[2])

    def matrix(self, weight: ir.Value) -> QuantizedWeight | None:
        """For MatMulNBits; None: this weight isn't quantized."""
        rows, width = dims(weight)
        layout = self._format_of(weight)
        if layout is None:
            return None
        entry = self._entry(weight, layout)
        offsets = None
        if layout.has_offsets:
            output = Output(f"{weight.name}_offsets", ir.DataType.FLOAT, (layout.blocks(width), rows), row_axis=1)
            offsets = self._add(entry, output, lambda rows: rows.blocks.found_offsets.T)
        return self._matrix(weight, entry, self._packed_zero_points(weight, entry, (rows,), width), offsets)

    def table(self, weight: ir.Value, *, with_zero_points: bool = False) -> QuantizedWeight | None:
        """For GatherBlockQuantized, with the rows' blocks as an axis of their own; None: this weight isn't quantized.

        `with_zero_points`: a symmetric format has them too, all at the middle of the range.
        """
        rows, width = dims(weight)
        layout = self._format_of(weight)
        if layout is None:
            return None
        entry, n, zeros = self._entry(weight, layout), layout.blocks(width), None
        if with_zero_points or not layout.symmetric:

            def pick(rows: _Rows) -> NDArray[np.generic]:
                if layout.symmetric:
                    return np.full((len(rows.blocks.scales), n, 1), 1 << (layout.bits - 1), np.uint8)
                return rows.blocks.found_zero_points

            zeros = self._output(weight, entry, "block_zero_points", ir.DataType.UINT8, (rows, n, 1), pick)
        offsets = None
        if layout.has_offsets:
            offsets = self._output(
                weight, entry, "row_offsets", ir.DataType.FLOAT, (rows, n), lambda rows: rows.blocks.found_offsets
            )
        return self._matrix(weight, entry, zeros, offsets)

    def channels_of(self, matrix_codes: ir.Value) -> ChannelWeight:
        """For MatMulIntegerToFloat: 8 bits and one scale an output channel, beside the matrix form with these codes."""
        name = str(matrix_codes.name).removesuffix("_codes")
        entry = self._entries[name]
        (output,) = entry.recipe.outputs
        rows, width = output.shape
        codes = Output(f"{name}_channel_codes", ir.DataType.INT8, (width, rows), row_axis=1)
        scales = Output(f"{name}_channel_scales", ir.DataType.FLOAT, (rows,))
        return ChannelWeight(
            self._add(entry, codes, lambda rows: quantize_channels(rows.values)[0].T),
            self._add(entry, scales, lambda rows: quantize_channels(rows.values)[1]),
        )

    def experts(
        self,
        weight: ir.Value,
        layout: BlockFormat,
        size: tuple[int, int],
        arrange: Arrange = lambda rows, _: rows,
        rows_per_group: int = 1,
    ) -> QuantizedWeight:
        """For QMoE.

        Args:
            weight: all experts' matrices, float.
            layout: how to quantize these.
            size: (N, K) of an expert's matrix once `arrange` ordered and padded its rows, K padded to whole blocks.
            arrange: stacked rows of whole experts -> their rows in the kernel's order.
            rows_per_group: source rows that `arrange` needs together.
        """
        lead, width = (dims(weight)[0], size[0]), size[1]
        n, entry = layout.blocks(width), self._entry(weight, layout, arrange, rows_per_group)
        codes_shape = (*lead, n * layout.block_bytes)
        return QuantizedWeight(
            entry.layout,
            self._output(weight, entry, "codes", ir.DataType.UINT8, codes_shape, lambda rows: rows.blocks.codes),
            self._scales(weight, entry, (*lead, n)),
            self._packed_zero_points(weight, entry, lead, width),
        )

    def _matrix(
        self, weight: ir.Value, entry: _Entry, zero_points: ir.Value | None, offsets: ir.Value | None
    ) -> QuantizedWeight:
        rows, width = dims(weight)
        n = entry.layout.blocks(width)
        codes_shape = (rows, n, entry.layout.block_bytes)
        return QuantizedWeight(
            entry.layout,
            self._output(weight, entry, "codes", ir.DataType.UINT8, codes_shape, lambda rows: rows.blocks.codes),
            self._scales(weight, entry, (rows, n)),
            zero_points,
            offsets,
        )

    def _scales(self, weight: ir.Value, entry: _Entry, shape: tuple[int, ...]) -> ir.Value:
        dtype = self._scale_type
        return self._output(
            weight, entry, "scales", dtype, shape, lambda rows: rows.blocks.scales.astype(dtype.numpy(), copy=False)
        )

    def _packed_zero_points(
        self, weight: ir.Value, entry: _Entry, lead: tuple[int, ...], width: int
    ) -> ir.Value | None:
        if entry.layout.symmetric:
            return None
        shape, bits = (*lead, entry.layout.zero_point_bytes(width)), entry.layout.bits
        return self._output(
            weight,
            entry,
            "zero_points",
            ir.DataType.UINT8,
            shape,
            lambda rows: pack(rows.blocks.found_zero_points, bits),
        )

    def _entry(
        self,
        weight: ir.Value,
        layout: BlockFormat,
        arrange: Arrange = lambda rows, _: rows,
        rows_per_group: int = 1,
    ) -> _Entry:
        name = str(weight.name)
        if name not in self._entries:
            recipe = self._traced.recipes.pop(name)
            keeps_codes = self._can_keep_codes(recipe, layout)
            rows_per_group = math.lcm(rows_per_group, recipe.rows_per_group)
            self._entries[name] = _Entry(recipe, keeps_codes, arrange, layout, self._scale_type, rows_per_group)
        return self._entries[name]

    def _can_keep_codes(self, recipe: Recipe, layout: BlockFormat) -> bool:
        """Whether all sources are codes that fit the layout; if only some, the reason is noted."""
        reasons: dict[str, str | None] = {}
        for source in recipe.sources:
            encoding = self._traced.encodings.get(source.name)
            if encoding is None:
                reasons[source.name] = "plain numbers"
            elif encoding.form is None:
                reasons[source.name] = "no kernel takes codes of this type"
            else:
                form = encoding.form if source.column_order is None else replace(encoding.form, has_permutation=False)
                reasons[source.name] = obstacle(form, source.shape[-1], layout, self._scale_type.numpy())
        if not any(reasons.values()):
            return True
        for name in reasons.keys() & self._traced.encodings.keys():
            self._traced.refused_codes[name] = reasons[name] or "stacked with tensors whose codes don't fit"
        return False

    def _output(
        self, weight: ir.Value, entry: _Entry, part: str, dtype: ir.DataType, shape: tuple[int, ...], pick: Pick
    ) -> ir.Value:
        return self._add(entry, Output(f"{weight.name}_{part}", dtype, shape), pick)

    def _add(self, entry: _Entry, output: Output, pick: Pick) -> ir.Value:
        """The initializer of one part; on first use it and the weight's recipe for it are made."""
        initializers = self._traced.model.graph.initializers
        if output.name not in initializers:
            entry.outputs.append(output)
            entry.picks.append(pick)
            self._traced.recipes[entry.outputs[0].name] = entry.quantized_recipe()
            shape = ir.Shape(output.shape)
            initializers.add(ir.Value(name=output.name, type=ir.TensorType(output.dtype), shape=shape))
        return initializers[output.name]


def dims(weight: ir.Value) -> tuple[int, ...]:
    """The static shape of an initializer."""
    assert weight.shape is not None and weight.shape.is_static()
    return weight.shape.numpy()
