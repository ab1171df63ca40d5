"""Which block format each weight of a graph is stored in: by its class, as asked for, or by the checkpoint's codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.checkpoint.storage import Storage
from qwen_aot.exporter.model.tensors import SENSITIVE, WeightClass, weight_class_of
from qwen_aot.exporter.quantize.blockwise import BLOCK_SIZES, BlockFormat
from qwen_aot.exporter.quantize.own_codes import (
    AS_FLOATS,
    SignedFormat,
    block_format,
    have_codes,
    no_blocks,
    no_expert_minimums,
    require_scales,
    signed_format,
)
from qwen_aot.exporter.weights.recipe import Recipe

TABLES = frozenset({WeightClass.EMBEDDING, WeightClass.HEAD})


class Formats(Protocol):
    """Chooses the format of each weight; None: it isn't quantized."""

    def matrix(self, name: str, recipe: Recipe) -> BlockFormat | None:
        """Of a matrix [N, K] or a table [V, M], by its initializer's name."""

    def experts(self, gate_up: Recipe, down: Recipe, m: int) -> BlockFormat | None:
        """Of both matrices of routed experts, whose kernel wants one format, of blocks that divide M."""


@dataclass(frozen=True, slots=True)
class ByClass:
    """As asked for.

    Attributes:
        layout: of most matrices.
        sensitive: of matrices of the classes SENSITIVE.
    """

    layout: BlockFormat
    sensitive: BlockFormat

    def matrix(self, name: str, recipe: Recipe) -> BlockFormat | None:
        """By the class of the initializer."""
        return self.sensitive if weight_class_of(name) in SENSITIVE else self.layout

    def experts(self, gate_up: Recipe, down: Recipe, m: int) -> BlockFormat | None:
        """The asked for, in blocks that shrink until they divide M; None where none does."""
        dividing = [size for size in BLOCK_SIZES if size <= self.layout.block_size and m % size == 0]
        return dataclasses.replace(self.layout, block_size=max(dividing)) if dividing else None


@dataclass(frozen=True, slots=True)
class ByCodes:
    """What the checkpoint stores as codes keeps them; the rest stays as computed.

    Attributes:
        storage: of the checkpoint's tensors.
        scale_dtype: in which the kernels take scales.
        tables: of embedding and head where these are plain numbers; None: they stay so.
    """

    storage: Storage
    scale_dtype: DTypeLike
    tables: BlockFormat | None

    def matrix(self, name: str, recipe: Recipe) -> BlockFormat | None:
        """By the codes of its tensors.

        Raises:
            ExportError: no format holds them.
        """
        names = [source.name for source in recipe.sources]
        if not any(each in self.storage.encodings for each in names):
            return self.tables if weight_class_of(name) in TABLES else None
        forms = self.forms(name, names)
        found = block_format(forms, recipe.sources[0].shape[1], np.dtype(self.scale_dtype).itemsize)
        if found is None:
            raise no_blocks(name, forms, BLOCK_SIZES)
        return found

    def experts(self, gate_up: Recipe, down: Recipe, m: int) -> BlockFormat | None:
        """By the codes of all experts.

        Raises:
            ExportError: no format holds all of them, or only some are codes.
        """
        names = [source.name for recipe in (gate_up, down) for source in recipe.sources]
        if not any(each in self.storage.encodings for each in names):
            return None
        what = f"the experts' {gate_up.outputs[0].name} and {down.outputs[0].name}"
        forms = self.forms(what, names)
        self.require_one_order(gate_up)
        if any(form.has_offsets for form in forms):
            raise no_expert_minimums(what, forms)
        f = down.sources[0].shape[1]
        found = block_format(forms, f, np.dtype(self.scale_dtype).itemsize, (m, *_groups_within(forms, m)))
        if found is None:
            raise no_blocks(what, forms, BLOCK_SIZES)
        return found

    def require_one_order(self, gate_up: Recipe) -> None:
        """Refuses experts whose gate and up projections couldn't be given one order of columns.

        Raises:
            ExportError: they have several.
        """
        if any(source.column_order is None and source.name in self.storage.permutations for source in gate_up.sources):
            raise ExportError(
                f"experts' {gate_up.outputs[0].name} have their columns in different orders (g_idx of act-order), and "
                "one kernel reads them all; accepted: one order for gate and up of all experts of a layer; or "
                f"{AS_FLOATS}"
            )

    def signed(self, name: str, names: Sequence[str], width: int) -> SignedFormat:
        """Of a matrix of codes [N, K] in TensorRT's graph.

        Raises:
            ExportError: no format holds them.
        """
        forms = self.forms(name, names)
        found = signed_format(forms, width)
        if found is None:
            raise no_blocks(f"{name}, with rows of {width},", forms, BLOCK_SIZES)
        return found

    def forms(self, what: str, names: Sequence[str]) -> list[CodeForm]:
        """Of tensors that are stored together.

        Raises:
            ExportError: one has none, or scales that the kernels don't take.
        """
        if not have_codes(names, self.storage):
            unread = [name for name in names if self.storage.form(name) is None]
            raise ExportError(
                f"{what} can't keep the checkpoint's codes: {_why(unread[0], self.storage.encodings)}; accepted: all "
                f"tensors of it as codes; or {AS_FLOATS}"
            )
        forms = [form for name in names if (form := self.storage.form(name)) is not None]
        require_scales(what, forms, self.scale_dtype)
        return forms


def _groups_within(forms: Sequence[CodeForm], width: int) -> set[int]:
    """Group sizes that rows of `width` have more than one of."""
    return {form.group_size for form in forms if form.group_size < width}


def _why(name: str, encodings: Mapping[str, object]) -> str:
    return f"{name} is of a type without codes" if name in encodings else f"{name} is plain numbers"
