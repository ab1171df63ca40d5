"""The cpu target: the graph ONNX Runtime runs fastest, and a check that it loads."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import onnx_ir as ir

from qwen_aot.engines.builders import EngineFacts
from qwen_aot.engines.bundle.io_table import io_tensor
from qwen_aot.engines.bundle.stages import Advance
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.errors import BuildError, EngineMismatchError, onnxruntime_errors
from qwen_aot.exporter.graph.save import KERNELS_MODEL_FILE, MODEL_FILE, save_beside
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.lowering.ort.kernels import CPU_OPS_VERSION, use_kernels
from qwen_aot.exporter.quantize.blockwise import BlockFormat
from qwen_aot.exporter.quantize.own_codes import TABLE_BLOCK
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.extras import how_to_install
from qwen_aot.runtime.backends.cpu.kernels import CpuLibrary, require_library
from qwen_aot.runtime.bundle.manifest import KernelGraph, Manifest
from qwen_aot.whole_folder import explained

logger = logging.getLogger(__name__)


def require(spec: BuildSpec) -> None:
    """Refuses a machine without ONNX Runtime: only the check at the end needs it, when all else has been spent.

    Raises:
        BuildError: it isn't installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise BuildError(f"a cpu bundle is checked with onnxruntime, which isn't installed; {how_to_install('cpu')}")


def lower(traced: Traced, spec: BuildSpec) -> Traced:
    """The ort lowering, with weights in the blocks that the spec asks for."""
    layout, sensitive = block_formats(spec)
    options = OrtOptions(
        layout,
        sensitive,
        fast_prefill=spec.fast_prefill,
        own_codes=spec.own_codes,
        int8_cache=spec.has_calibrated_cache,
    )
    return ort.lower(traced, options)


def block_formats(spec: BuildSpec) -> tuple[BlockFormat | None, BlockFormat | None]:
    """How most matrices and how the sensitive ones are quantized; (None, None): not at all.

    Beside a checkpoint's own codes, the second is of embedding and head, where it was asked for.
    """
    if spec.own_codes:
        return None, None if spec.sensitive_bits is None else BlockFormat(spec.sensitive_bits, TABLE_BLOCK)
    row, block_size, sensitive_bits = spec.precision.row, spec.effective_block_size, spec.effective_sensitive_bits
    if not row.is_quantized:
        return None, None
    assert block_size is not None and sensitive_bits is not None
    return BlockFormat(row.bits, block_size, spec.symmetric), BlockFormat(sensitive_bits, block_size, spec.symmetric)


def finish(folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> EngineFacts | None:
    """Writes the graph for own kernels beside model.onnx, which ONNX Runtime runs as it is and which stays the engine.

    Returns:
        None where the spec has no such graph, or no node of it a kernel of ours.
    """
    if spec.own_kernels_cache_type is None:
        return None
    # Read anew: `lowered` stays the graph that model.onnx holds.
    model = ir.load(folder / MODEL_FILE)
    replaced = use_kernels(model, ir.DataType[spec.own_kernels_cache_type])
    if not replaced:
        return None
    logger.info(
        "own kernels: %d projections, %d attentions, experts of %d layers",
        *(replaced.linears, replaced.attentions, replaced.experts),
    )
    with explained(folder):
        save_beside(model, folder, KERNELS_MODEL_FILE)
    inputs, outputs = (
        tuple(map(io_tensor, values)) for values in (lowered.model.graph.inputs, lowered.model.graph.outputs)
    )
    cache_dtype = next(io_tensor(value).dtype for value in model.graph.inputs if value.name == "past_key_values.0.key")
    kernels = KernelGraph(KERNELS_MODEL_FILE, CPU_OPS_VERSION, cache_dtype)
    return EngineFacts(inputs, outputs, tensorrt=None, plan=None, kernels=kernels)


def lower_vision(traced: Traced, spec: BuildSpec) -> Traced:
    """The ort lowering; weights stay in the compute type, whatever those of the decoder are."""
    return ort.lower(traced)


def finish_vision(folder: Path, spec: BuildSpec, lowered: Traced, advance: Advance) -> None:
    """Nothing: ONNX Runtime runs vision.onnx as it is."""


def check(folder: Path, manifest: Manifest) -> None:
    """Opens a session of each engine: the graph is valid, every node has a kernel, every weight lies in its file.

    Of ONNX Runtime's graph weights stay memory-mapped: packing them as the runtime does would take as much memory again
    as the model.

    The graph for own kernels is opened where this machine has their library; it may be one that only builds. They copy
    weights as they do when it runs: where twice as much memory is free as a matrix takes, and QWEN_AOT_CPU_WEIGHTS
    isn't "mapped".

    Raises:
        BuildError: a session doesn't open.
    """
    import onnxruntime

    files: list[tuple[str, CpuLibrary | None]] = [(engine.file, None) for engine in manifest.engines.all]
    if (kernels := manifest.engines.text.kernels) is not None:
        try:
            files.append((kernels.file, require_library()))
        except EngineMismatchError as error:
            logger.info("%s is written and not opened: %s", kernels.file, error)
    for file, library in files:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            if library is not None:
                options.register_custom_ops_library(str(library.path))
            onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
        except onnxruntime_errors() as error:
            raise BuildError(
                f"onnxruntime {onnxruntime.__version__} can't open the built engine {file}: {error}"
            ) from error
