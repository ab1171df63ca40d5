"""What a build becomes of a checkpoint that fixes its precision, or whose own codes were asked for.

GPTQ, AWQ and their like keep their codes without being asked, GGUF files where own codes are asked for.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import PRECISIONS, Precision
from qwen_aot.engines.spec.targets import TARGETS
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType, Encoding
from qwen_aot.exporter.checkpoint.storage import Storage
from qwen_aot.exporter.model.tensors import Role


class NoProductsError(BuildError):
    """A target has no products of the codes that a checkpoint fixes."""


_TABLES = (Role.EMBEDDING.tensor_name(), Role.HEAD.tensor_name())


def settled(spec: BuildSpec, storage: Storage) -> BuildSpec:
    """The spec for a checkpoint: its own codes, if they were asked for, or it fixes its precision and floats weren't.

    Any other checkpoint leaves the spec as it is.

    Raises:
        NoProductsError: the target has no products of the checkpoint's codes.
        BuildError: something was asked for that would round the checkpoint's numbers again, or there are no codes to
            keep. Says what was found and what is accepted.
    """
    encodings = list(storage.encodings.values())
    fixed = encodings if spec.own_codes else [each for each in encodings if each.fixes_precision]
    if not fixed:
        if spec.own_codes:
            raise BuildError("own_codes has nothing to keep: the checkpoint stores its weights as plain numbers")
        return spec
    name, found = precision_of(fixed), _described(fixed)
    if "precision" in spec.asked and not spec.precision.row.is_quantized:
        return spec
    if "precision" in spec.asked and spec.precision != name:
        floats = [row.name for row in PRECISIONS.values() if not row.is_quantized and spec.target in row.targets]
        raise BuildError(
            f"precision {spec.precision} would round the weights a second time: the checkpoint stores {found}, which "
            f"fixes the precision; accepted: {name} (the default here), its own codes; or {', '.join(floats)}, floats "
            "made of them; leave out precision"
        )
    rounded = next((each for each in fixed if each.form is not None and each.form.has_input_scale), None)
    if rounded is not None and rounded.form is not None and rounded.form.code_type not in spec.facts.rounds_inputs:
        raise NoProductsError(no_rounded_inputs(spec, rounded.form.code_type, f"the checkpoint stores {found}"))
    if spec.fast_prefill and all(each.form is not None and each.form.has_input_scale for each in fixed):
        raise BuildError(
            "fast_prefill has nothing to make faster: the checkpoint's products are of 8-bit codes in any step; "
            "leave fast_prefill out"
        )
    refused = {"block_size": spec.block_size, "symmetric": spec.symmetric}
    if not any(table in storage.dtypes for table in _TABLES):
        refused["sensitive_bits"] = spec.sensitive_bits
    for option in refused.keys() & spec.asked:
        raise BuildError(
            f"{option} {refused[option]} conflicts with the checkpoint, which stores {found}, and whose codes a build "
            f"keeps: each matrix has its own bits, blocks and zero points; leave {option} out"
        )
    return dataclasses.replace(spec, precision=name, block_size=None, symmetric=True, own_codes=True)


def no_rounded_inputs(spec: BuildSpec, code_type: CodeType, why: str) -> str:
    """What is said where a target has no products of codes of a type."""
    having = ", ".join(target for target, facts in TARGETS.items() if code_type in facts.rounds_inputs)
    kind = "W8A8" if code_type is CodeType.INTEGER else "W8A8 of E4M3 floats"
    floats = [row.name for row in PRECISIONS.values() if not row.is_quantized and spec.target in row.targets]
    return (
        f"{why}, whose products round their inputs too ({kind}), and target {spec.target} has none; accepted: target "
        f"{having}; or precision {', '.join(floats)} of a checkpoint, floats whose inputs aren't rounded"
    )


def precision_of(encodings: Sequence[Encoding]) -> Precision:
    """What most tensors are nearest to: int4, int8 or fp8."""
    forms = [encoding.form for encoding in encodings if encoding.form is not None]
    if any(form.code_type is CodeType.E4M3 for form in forms):  # a folder has one type
        return Precision.FP8
    is_four = sum(form.bits <= 4 for form in forms) * 2 >= len(forms)
    return Precision.INT4 if is_four else Precision.INT8


def _described(encodings: Sequence[Encoding]) -> str:
    """The kinds of tensors, the most frequent first."""
    counts = Counter((encoding.name, encoding.form) for encoding in encodings)
    return ", ".join(f"{count} tensors of {name}{_form(form)}" for (name, form), count in counts.most_common(3))


def _form(form: CodeForm | None) -> str:
    if form is None:
        return ""
    zeros = " with zero points" if form.has_zero_points else " with minimums" if form.has_offsets else ""
    inputs = ", inputs rounded too" if form.has_input_scale else ""
    return f" ({form.kind} in groups of {form.group_size}{zeros}{inputs})"
