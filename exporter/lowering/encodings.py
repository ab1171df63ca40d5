"""Which of a checkpoint's own codes reach a lowered graph, and a warning about those that are rounded anew."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qwen_aot.exporter.checkpoint.encoding import CodeForm
from qwen_aot.exporter.checkpoint.names import CANONICAL
from qwen_aot.exporter.model.tensors import SENSITIVE, WeightClass
from qwen_aot.exporter.quantize.blockwise import BLOCK_SIZES
from qwen_aot.exporter.weights.recipe import Recipe, Traced

logger = logging.getLogger(__name__)

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def encodings_kept(lowered: Traced) -> dict[str, int]:
    """Encoding -> the number of its tensors whose codes and scales the graph carries as the checkpoint has them."""
    return _counts(lowered, are_kept=True)


def encodings_requantized(lowered: Traced) -> dict[str, int]:
    """Encoding -> the number of its tensors that the graph has in another form, made from floats."""
    return _counts(lowered, are_kept=False)


def warn_of_rounding(lowered: Traced) -> tuple[str, ...]:
    """Logs and returns one warning that names what is rounded a second time, and how to keep it; none where nothing is.

    Floats made of codes are exact in fp32, so fp32 weights lose nothing.
    """
    lost: Counter[tuple[str, str]] = Counter()
    fit_own_blocks = 0  # tensors that own codes would keep
    forms: Counter[CodeForm] = Counter()  # of tensors that other blocks would keep
    kept: list[tuple[str, CodeForm]] = []  # by name: what the remedy must hold, what is kept already included
    for name, recipes in _users(lowered).items():
        recipe = next((recipe for recipe in recipes if _rounds(lowered, recipe)), None)
        encoding, refusal = lowered.encodings[name], lowered.refused_codes.get(name)
        if recipe is None:
            if encoding.form is not None:
                kept.append((name, encoding.form))
            continue
        lost[encoding.name, refusal or _rounding(recipe)] += 1
        fit_own_blocks += refusal is not None and all(_fits_own_blocks(lowered, recipe) for recipe in recipes)
        if encoding.form is not None and refusal is not None and _fits_other_blocks(lowered, recipe):
            forms[encoding.form] += 1
            kept.append((name, encoding.form))
    if not lost:
        return ()
    what = "; ".join(f"{count} of {name} ({reason})" for (name, reason), count in sorted(lost.items()))
    flags, helped = flags_that_keep(kept) if forms else None, forms.total()
    which = "the checkpoint's own numbers" if helped == lost.total() else f"the numbers of {helped} of them"
    if helped != lost.total() and fit_own_blocks == lost.total():
        flags, which = "--own-codes", "the checkpoint's own numbers"
    remedy = f"; {flags} keeps {which}" if flags else ""
    warning = f"tensors that the checkpoint stores quantized are rounded a second time: {what}{remedy}"
    logger.warning("%s", warning)
    return (warning,)


def flags_that_keep(forms: Sequence[tuple[str, CodeForm]]) -> str | None:
    """The command line's flags for blocks that the codes of all these tensors fit; None: there are none.

    Sensitive matrices have 8 bits in any case; the others decide between int4 and int8.
    """
    sizes = [size for size in BLOCK_SIZES if all(form.group_size % size == 0 for _, form in forms)]
    if not forms or not sizes:
        return None
    plain = [form for name, form in forms if not _is_sensitive(name)]
    precision = "int4" if all(form.bits <= 4 for form in plain or [form for _, form in forms]) else "int8"
    zero_points = " --asymmetric" if any(form.has_zero_points for _, form in forms) else ""
    return f"--precision {precision} --block-size {sizes[-1]}{zero_points}"


def _is_sensitive(tensor: str) -> bool:
    return _class_of(tensor) in SENSITIVE


def _class_of(tensor: str) -> WeightClass | None:
    place = CANONICAL.find(tensor)
    return None if place is None else place.role.weight_class


def _counts(lowered: Traced, *, are_kept: bool) -> dict[str, int]:
    names = (
        lowered.encodings[name].name
        for name, recipes in _users(lowered).items()
        if all(recipe.from_codes is not None for recipe in recipes) == are_kept
    )
    return dict(sorted(Counter(names).items()))


def _users(lowered: Traced) -> dict[str, list[Recipe]]:
    """The recipes that read each encoded tensor."""
    users: dict[str, list[Recipe]] = {}
    for recipe in lowered.recipes.values():
        for source in recipe.sources:
            if source.name in lowered.encodings:
                users.setdefault(source.name, []).append(recipe)
    return users


def _rounds(lowered: Traced, recipe: Recipe) -> bool:
    """Whether the outputs hold other values than the checkpoint."""
    is_fp32 = lowered.compute_type == ir.DataType.FLOAT and all(
        output.dtype == ir.DataType.FLOAT for output in recipe.outputs
    )
    return recipe.from_codes is None and not is_fp32


def _fits_other_blocks(lowered: Traced, recipe: Recipe) -> bool:
    """Whether blocks are all that keeps the recipe from taking codes: other flags would."""
    return all(
        form is not None and not (form.has_permutation or form.has_offsets) and _holds_scales(lowered, form)
        for form in _forms(lowered, recipe)
    )


def _fits_own_blocks(lowered: Traced, recipe: Recipe) -> bool:
    """Whether `--own-codes` would keep the recipe's tensors, of types without an order of columns.

    Parts of a stack that are numbers become products of their own there.
    """
    has_experts = any(_class_of(source.name) is WeightClass.EXPERT for source in recipe.sources)
    return all(
        form is None or (_holds_scales(lowered, form) and not (has_experts and form.has_offsets))
        for form in _forms(lowered, recipe)
    )


def _forms(lowered: Traced, recipe: Recipe) -> list[CodeForm | None]:
    return [lowered.storage.form(source.name) for source in recipe.sources]


def _holds_scales(lowered: Traced, form: CodeForm) -> bool:
    return np.can_cast(form.scale_dtype, lowered.compute_type.numpy())


def _rounding(recipe: Recipe) -> str:
    """What is done to floats, by what is made of them."""
    dtype = recipe.outputs[0].dtype
    return f"as {dtype.name.lower()}" if dtype in _FLOATS else "this target quantizes from floats"
