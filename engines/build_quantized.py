"""Builds a bundle of a checkpoint that is quantized first: the two jobs as one, for who wants no folder between."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from qwen_aot.engines.build import Verifier, build_bundle
from qwen_aot.engines.bundle.build_report import BuildReport
from qwen_aot.engines.bundle.progress import OnProgress, ignore_progress
from qwen_aot.engines.bundle.writer import refuse_unless_replaceable
from qwen_aot.engines.quantize import quantize_checkpoint
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.flavours import check_options
from qwen_aot.engines.spec.own_codes import no_rounded_inputs
from qwen_aot.engines.spec.precisions import QUANTIZED_PRECISIONS
from qwen_aot.engines.spec.quantize_spec import QuantizeSpec
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.encoding import CodeType
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.rounding.algorithms import ALGORITHMS
from qwen_aot.runtime.bundle.flavours import FLAVOURS
from qwen_aot.whole_folder import explained

_TABLE_BITS = 8  # of embedding and head, which the folder has as plain numbers
_COUNTS_AS = {CodeType.INTEGER: "int8", CodeType.E4M3: "fp8"}  # what a build calls codes whose inputs are rounded too


def settled_algorithm(precision: str | None, algorithm: str | None) -> tuple[str | None, str | None]:
    """What a build is asked for, by precision and algorithm as the user gave them: the same, without such a name.

    Raises:
        BuildError: both are given, and the precision is of another algorithm.
    """
    made = QUANTIZED_PRECISIONS.get(precision or "")
    if made is None:
        return precision, algorithm
    if algorithm not in (None, made.algorithm):
        raise BuildError(
            f"precision {precision} is made by algorithm {made.algorithm}, and algorithm is {algorithm}; leave one out"
        )
    return None, made.algorithm


def quantize_spec_for(spec: BuildSpec, algorithm: str) -> QuantizeSpec:
    """How a checkpoint is quantized for a build.

    Raises:
        BuildError: the algorithm isn't known, or what the build asks for has no codes by it.
    """
    row = ALGORITHMS.get(algorithm)
    makes = {"fp8": 8} if row is not None and row.rounds_inputs is CodeType.E4M3 else {"int4": 4, "int8": 8}
    bits = makes.get(spec.precision) if "precision" in spec.asked else None
    if bits is None and "precision" in spec.asked:
        raise BuildError(
            f"algorithm {algorithm} makes {'E4M3 floats' if 'fp8' in makes else 'integers'}, and precision is "
            f"{spec.precision}; accepted: {', '.join(makes)}"
        )
    if row is not None and row.rounds_inputs is not None:
        if row.rounds_inputs not in spec.facts.rounds_inputs:
            raise BuildError(no_rounded_inputs(spec, row.rounds_inputs, f"algorithm is {algorithm}"))
        flavour = FLAVOURS.get(spec.target)
        if flavour is not None:  # before minutes of calibration
            check_options(flavour, spec.tensorrt, _COUNTS_AS[row.rounds_inputs])
        # Embedding and head, which it leaves plain, have sensitive_bits in the build.
        block_size = spec.block_size if "block_size" in spec.asked else None
        return QuantizeSpec(algorithm=algorithm, bits=bits, group_size=block_size, symmetric=spec.symmetric)
    bits = bits or 4
    # TensorRT takes scales above 0 alone, which symmetric codes don't keep to (`exporter.rounding.grid`).
    symmetric = spec.symmetric and spec.facts.weight_layout == "blocks"
    return QuantizeSpec(
        algorithm=algorithm,
        bits=bits,
        group_size=spec.block_size,
        symmetric=symmetric,
        sensitive_bits=max(bits, spec.sensitive_bits) if spec.sensitive_bits else None,
    )


def build_quantized(
    checkpoint: Checkpoint,
    algorithm: str,
    spec: BuildSpec,
    out: Path,
    *,
    keep: Path | None = None,
    on_progress: OnProgress = ignore_progress,
    verifier: Verifier | None = None,
    threads: int | None = None,
) -> BuildReport:
    """Quantizes a checkpoint into a folder, and builds a bundle that has its codes.

    Args:
        checkpoint: opened.
        algorithm: a name of `exporter.rounding.algorithms.ALGORITHMS`.
        spec: of the bundle; bits, blocks and zero points are the folder's.
        out: the bundle's folder.
        keep: where the quantized folder stays; None: it lies beside `out` until the bundle is whole, so that a killed
            job goes on, and is deleted.
        on_progress: told about each step of both.
        verifier: see `build_bundle`.
        threads: see `build_bundle`.

    Raises:
        DeployError: either failed; `out` is as it was.
    """
    out = out.expanduser().resolve()
    with explained(out):
        refuse_unless_replaceable(out)
    quantize_spec = quantize_spec_for(spec, algorithm)
    beside = out.with_name(f".{out.name}.quantized")
    folder = keep or beside / checkpoint.name
    quantize_checkpoint(checkpoint, quantize_spec, folder, threads=threads, on_progress=on_progress)
    with open_checkpoint(folder) as quantized:
        by_codes: dict[str, Any] = {"precision": None, "block_size": None, "symmetric": None, "sensitive_bits": None}
        if spec.facts.weight_layout == "blocks":
            by_codes["sensitive_bits"] = spec.sensitive_bits or _TABLE_BITS
        of_codes = dataclasses.replace(spec, **by_codes)
        report = build_bundle(quantized, of_codes, out, on_progress=on_progress, verifier=verifier, threads=threads)
    if keep is None:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # it holds what isn't ours
            beside.rmdir()
    return report
