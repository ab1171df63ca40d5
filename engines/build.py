"""Turns a checkpoint into a bundle: the stages in order, what each costs, the plan that a dry run shows."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qwen_aot.engines.builders import Builder, EngineFacts, builder_for
from qwen_aot.engines.bundle.build_report import REPORT_NAME, BuildReport
from qwen_aot.engines.bundle.compiled_text import COMPILED_CHAT_NAME, COMPILED_TOKENIZER_NAME, compile_text
from qwen_aot.engines.bundle.default_length import default_max_new_tokens
from qwen_aot.engines.bundle.io_table import io_tensor
from qwen_aot.engines.bundle.progress import OnProgress, ignore_progress
from qwen_aot.engines.bundle.resources import Estimate, check_resources, estimate, threads_for
from qwen_aot.engines.bundle.stages import Advance, Stages
from qwen_aot.engines.bundle.text_facts import TextFacts, text_facts
from qwen_aot.engines.bundle.versions import tool_versions
from qwen_aot.engines.bundle.writer import BundleWriter, refuse_unless_replaceable
from qwen_aot.engines.calibrate import calibration_bytes, calibration_windows, set_cache_scales
from qwen_aot.engines.profiles import most_gathered_tokens, profiles
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.own_codes import settled
from qwen_aot.engines.vision import Vision, image_token_warnings, lower_vision, require_vision
from qwen_aot.errors import BuildError
from qwen_aot.exporter.checkpoint.base import Checkpoint
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.checkpoint.storage import Storage, storage_of
from qwen_aot.exporter.graph.save import DATA_FILE, MODEL_FILE, VISION_MODEL_FILE, data_file_of, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.graph.vision_trace import trace_vision
from qwen_aot.exporter.lowering.encodings import encodings_kept, encodings_requantized, warn_of_rounding
from qwen_aot.exporter.model.config import ModelConfig
from qwen_aot.exporter.model.tensors import num_activated_parameters
from qwen_aot.exporter.model.vision_tensors import num_model_parameters
from qwen_aot.exporter.weights.recipe import Traced, output_bytes_of
from qwen_aot.exporter.weights.sources import check_headers
from qwen_aot.exporter.weights.stitch import chunk_bytes, output_bytes, stitch
from qwen_aot.runtime.bundle.manifest import (
    FORMAT_VERSION,
    Engines,
    FileEntry,
    Manifest,
    ModelFacts,
    TextEngine,
    TextFiles,
    WeightEncodings,
    cache_capacity,
)
from qwen_aot.whole_folder import FolderWriter, explained

__all__ = ["BuildReport", "Made", "Plan", "Verifier", "build_bundle", "make_plan", "plan_build", "write_parts"]

logger = logging.getLogger(__name__)

Verifier = Callable[[Path, Advance], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Made:
    """What came of one engine: the hashes of its weights, and what it says about itself if it was compiled."""

    hashes: Mapping[str, str]
    facts: EngineFacts | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A build up to the point where its sizes are known; nothing is written yet.

    Attributes:
        vision: the second engine; None: the model takes no images.
        windows: token ids [sequences, T] that the cache's scales are found by; None: it has none that are found so.
        texts: small files of the bundle, name -> content.
        compiled_texts: those of text compiled ahead of time, (name, content) of each.
        manifest_for: makes the manifest from the bundle's files and what was made of each engine.
    """

    traced: Traced
    vision: Vision | None
    estimate: Estimate
    manifest_for: Callable[[Mapping[str, FileEntry], Made, Made | None], Manifest]
    windows: NDArray[np.int64] | None
    texts: Mapping[str, str]
    compiled_texts: tuple[tuple[str, bytes], ...]
    warnings: tuple[str, ...]


def plan_build(
    checkpoint: Checkpoint,
    spec: BuildSpec,
    out: Path,
    *,
    on_progress: OnProgress = ignore_progress,
    threads: int | None = None,
) -> Plan:
    """Does everything but write: checks, traces, lowers and sizes up. This is `--dry-run`.

    Raises:
        BuildError: the request, `out`, the disk or the memory won't do.
    """
    out = out.expanduser().resolve()
    with explained(out):
        refuse_unless_replaceable(out)
    storage = storage_of(checkpoint)
    spec = settled(spec, storage)
    stages = Stages(("trace", "lower"), on_progress)
    plan = make_plan(checkpoint, spec, storage, stages, builder_for(spec.target).require, threads)
    check_resources(plan.estimate, out)
    return plan


def build_bundle(
    checkpoint: Checkpoint | str | Path,
    spec: BuildSpec,
    out: Path | str,
    *,
    on_progress: OnProgress = ignore_progress,
    verifier: Verifier | None = None,
    threads: int | None = None,
) -> BuildReport:
    """Builds a bundle at `out`, replacing the one that stands there once the new one is whole.

    Args:
        checkpoint: opened (it stays open), or where it lies.
        spec: what to build.
        out: the bundle's folder.
        on_progress: told about each step.
        verifier: called with the finished but not yet installed bundle and a callback for progress; its result
            goes into report.json, and what it raises fails the build.
        threads: that stitch the weights at most; None: one for each core that this process may use.

    Raises:
        DeployError: the build failed; `out` is as it was.
    """
    if isinstance(checkpoint, str | Path):
        with open_checkpoint(checkpoint) as opened:
            return build_bundle(opened, spec, out, on_progress=on_progress, verifier=verifier, threads=threads)
    if verifier is not None and not spec.facts.can_verify_here:
        raise BuildError(
            f"a {spec.target} bundle can't be verified where it is built: its engine runs on its own GPU only; "
            "leave out --verify, and run `qwen-aot verify` on a machine with that GPU"
        )
    storage = storage_of(checkpoint)
    spec = settled(spec, storage)
    names = spec.facts.stage_names(
        with_calibration=spec.has_calibrated_cache,
        with_vision=checkpoint.config.vision is not None,
        with_verify=verifier is not None,
    )
    stages = Stages(names, on_progress)
    with BundleWriter(Path(out)) as writer:
        builder = builder_for(spec.target)
        plan = make_plan(checkpoint, spec, storage, stages, builder.require, threads)
        check_resources(plan.estimate, writer.out)
        hashes = write_parts(plan, checkpoint, writer, stages)
        made = Made(hashes, _finish(builder, spec, plan.traced, writer.folder, stages))
        vision = _make_vision(plan, builder, spec, checkpoint, writer, stages)

        def manifest_for(files: Mapping[str, FileEntry]) -> Manifest:
            return plan.manifest_for(files, made, vision)

        manifest = stages.run("hash", lambda advance: writer.seal(manifest_for, advance))
        stages.run(spec.facts.check_stage, lambda _: builder.check(writer.folder, manifest))
        verification: Mapping[str, Any] = {}
        if verifier is not None:
            verification = stages.run("verify", lambda advance: verifier(writer.folder, advance), "positions")
        warnings = plan.warnings + _doubts_of(verification)
        report = BuildReport(
            out=writer.out,
            manifest=manifest,
            estimate=plan.estimate,
            stages=tuple(stages.meter.costs),
            warnings=warnings,
            verification=verification,
        )
        writer.write_text(REPORT_NAME, json.dumps(report.to_json(), indent=2) + "\n")
        writer.seal(manifest_for)
        writer.commit()
    return report


def _doubts_of(verification: Mapping[str, Any]) -> tuple[str, ...]:
    """One warning where a verification that didn't fail shows nothing: the bundle is installed nevertheless."""
    if verification.get("verdict") != "inconclusive":
        return ()
    warning = f"the verification is inconclusive, and the bundle was kept: {'; '.join(verification['reasons'])}"
    logger.warning("%s", warning)
    return (warning,)


def _calibrate(plan: Plan, checkpoint: Checkpoint, advance: Advance) -> None:
    assert plan.windows is not None
    set_cache_scales(plan.traced, checkpoint, plan.windows, advance, plan.estimate.threads)


def _finish(builder: Builder, spec: BuildSpec, lowered: Traced, folder: Path, stages: Stages) -> EngineFacts | None:
    if not spec.facts.compiles:
        return builder.finish(folder, spec, lowered, lambda done, total: None)
    return stages.run("compile", lambda advance: builder.finish(folder, spec, lowered, advance), "%")


def _make_vision(
    plan: Plan, builder: Builder, spec: BuildSpec, checkpoint: Checkpoint, writer: BundleWriter, stages: Stages
) -> Made | None:
    """Writes the second engine, and compiles it where the target does."""
    if plan.vision is None:
        return None
    lowered = plan.vision.lowered

    def write(advance: Advance) -> Mapping[str, str]:
        with explained(writer.out):
            data_file = writer.folder / data_file_of(VISION_MODEL_FILE)
            hashes = stitch(lowered, checkpoint, data_file, on_progress=advance, threads=plan.estimate.threads)
            save_graph(lowered, writer.folder, VISION_MODEL_FILE)
        return hashes

    hashes = stages.run("write vision", write)
    if not spec.facts.compiles:
        return Made(hashes, builder.finish_vision(writer.folder, spec, lowered, lambda done, total: None))
    facts = stages.run(
        "compile vision", lambda advance: builder.finish_vision(writer.folder, spec, lowered, advance), "%"
    )
    return Made(hashes, facts)


def make_plan(
    checkpoint: Checkpoint,
    spec: BuildSpec,
    storage: Storage,
    stages: Stages,
    require: Callable[[BuildSpec], None],
    threads: int | None,
    *,
    compiles_here: bool = True,
) -> Plan:
    """The build up to the point where its sizes are known.

    Args:
        checkpoint: opened.
        spec: settled.
        storage: of the checkpoint.
        stages: "trace" and "lower" are run of it.
        require: refuses a machine that lacks what comes after.
        threads: see `build_bundle`.
        compiles_here: what compiling needs is counted, where the target compiles.

    Raises:
        DeployError: it can't be built.
    """
    threads_for(threads)  # refused before any work, as is what the manifest can't say
    max_new_tokens = default_max_new_tokens(checkpoint.tokenizer.files)
    config = checkpoint.config
    max_context = spec.context_for(config.max_position_embeddings)
    text = text_facts(checkpoint)
    compiled = compile_text(checkpoint.tokenizer.files, vocab_size=config.vocab_size)
    warnings = text.warnings + compiled.warnings
    builder = builder_for(spec.target)
    require(spec)
    if config.vision is not None:
        require_vision(spec)
        warnings += image_token_warnings(checkpoint)
    windows = calibration_windows(checkpoint) if spec.has_calibrated_cache else None
    check_headers(checkpoint)
    dtype = ir.DataType[spec.combination.compute_type]
    positions = cache_capacity(max_context, spec.prefill_chunk)
    capacity = positions if spec.facts.has_fixed_capacity else None
    speculates = spec.speculate is not None

    def trace_all(_: Advance) -> tuple[Traced, Traced | None]:
        decoder = trace(
            config,
            dtype,
            positions=positions,
            context=max_context,
            capacity=capacity,
            speculates=speculates,
            gather_up_to_tokens=most_gathered_tokens(config, spec),
        )
        return decoder, None if config.vision is None else trace_vision(config, dtype)

    traced, tower = stages.run("trace", trace_all)
    for each in (traced, tower):
        if each is not None:
            each.store_as(storage)
    lowered, vision = stages.run(
        "lower", lambda _: (builder.lower(traced, spec), None if tower is None else lower_vision(tower, builder, spec))
    )
    warnings += warn_of_rounding(lowered)
    texts = dict(checkpoint.tokenizer.files)
    needed = estimate(
        weight_bytes=output_bytes(lowered),
        text_bytes=sum(len(text.encode()) for text in texts.values())
        + sum(len(content) for _, content in compiled.files),
        chunk_bytes=max(chunk_bytes(lowered), 0 if vision is None else chunk_bytes(vision.lowered)),
        bits=spec.precision.row.bits,
        threads=threads,
        int4_bytes=output_bytes_of(lowered, ir.DataType.INT4),
        is_compiled=spec.facts.compiles and compiles_here,
        calibration_bytes=0 if windows is None else calibration_bytes(config),
        calibration_products=0 if windows is None else windows.size * num_activated_parameters(config),
        vision_bytes=0 if vision is None else output_bytes(vision.lowered),
    )
    return Plan(
        lowered,
        vision,
        needed,
        _manifest_maker(checkpoint, config, spec, max_context, max_new_tokens, text, lowered, vision),
        windows,
        texts,
        compiled.files,
        warnings,
    )


def write_parts(plan: Plan, checkpoint: Checkpoint, writer: FolderWriter, stages: Stages) -> Mapping[str, str]:
    """Writes texts, the graph and its weights into a folder under construction.

    Args:
        plan: of the build.
        checkpoint: opened.
        writer: entered.
        stages: "calibrate", where the plan has that, and "write weights" are run of it.

    Returns:
        Hashes of the weights, by the names of their initializers.

    Raises:
        DeployError: something can't be read or written.
    """
    for name, text in plan.texts.items():
        writer.write_text(name, text)
    for name, content in plan.compiled_texts:
        writer.write_bytes(name, content)
    if plan.windows is not None:
        stages.run("calibrate", lambda advance: _calibrate(plan, checkpoint, advance), "layers")
    return stages.run("write weights", lambda advance: _write_graph(plan, checkpoint, writer, advance))


def _write_graph(plan: Plan, checkpoint: Checkpoint, writer: FolderWriter, advance: Advance) -> Mapping[str, str]:
    """The graph and its weights; gives the hashes of these."""
    with explained(writer.out):
        data_file = writer.folder / DATA_FILE
        hashes = stitch(plan.traced, checkpoint, data_file, on_progress=advance, threads=plan.estimate.threads)
        save_graph(plan.traced, writer.folder)
    return hashes


def _manifest_maker(
    checkpoint: Checkpoint,
    config: ModelConfig,
    spec: BuildSpec,
    max_context: int,
    max_new_tokens: int | None,
    text: TextFacts,
    traced: Traced,
    vision: Vision | None,
) -> Callable[[Mapping[str, FileEntry], Made, Made | None], Manifest]:
    graph = traced.model.graph
    graph_inputs = tuple(io_tensor(value) for value in graph.inputs)
    graph_outputs = tuple(io_tensor(value) for value in graph.outputs)
    cache_dtype = next(tensor.dtype for tensor in graph_inputs if tensor.name == "past_key_values.0.key")
    return lambda files, made, made_vision: Manifest(
        format_version=FORMAT_VERSION,
        model=ModelFacts(
            name=checkpoint.name,
            model_type=config.model_type,
            num_parameters=num_model_parameters(config),
            vocab_size=config.vocab_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_ids=text.eos_token_ids,
            pad_token_id=config.pad_token_id,
            source=dict(checkpoint.source),
        ),
        target=str(spec.target),
        engines=Engines(
            text=TextEngine(
                file=MODEL_FILE if made.facts is None and spec.facts.compiles else spec.facts.engine_file,
                precision=str(spec.precision),
                quantization=dict(spec.quantization),
                weight_encodings=WeightEncodings(encodings_kept(traced), encodings_requantized(traced)),
                weight_hashes=made.hashes,
                inputs=graph_inputs if made.facts is None else made.facts.inputs,
                outputs=graph_outputs if made.facts is None else made.facts.outputs,
                tensorrt=None if made.facts is None else made.facts.tensorrt,
                plan=None if made.facts is None else made.facts.plan,
                profiles=profiles(spec.prefill_chunk, spec.speculate),
                cache_dtype=cache_dtype,
                logits_rows=spec.speculate,
                kernels=None if made.facts is None else made.facts.kernels,
            ),
            vision=None
            if vision is None or made_vision is None
            else vision.entry(made_vision.hashes, made_vision.facts),
        ),
        max_context=max_context,
        max_batch=spec.max_batch,
        prefill_chunk=spec.prefill_chunk,
        text=TextFiles(
            tokenizer="tokenizer.json" if "tokenizer.json" in files else None,
            compiled_tokenizer=COMPILED_TOKENIZER_NAME if COMPILED_TOKENIZER_NAME in files else None,
            compiled_chat_template=COMPILED_CHAT_NAME if COMPILED_CHAT_NAME in files else None,
        ),
        default_max_new_tokens=max_new_tokens,
        tool_versions=tool_versions(),
        files=files,
    )
