"""Compares our build of a TensorRT-RTX engine with TensorRT's own parse and build of the same ONNX file.

    python -m tests.bench.tensorrt_build qwen1.5-0.5b --rounds 3

Each side runs in a process of its own, in turn, round after round. TensorRT's side is the library's documented use and
nothing of ours: parse the file, two profiles, `build_serialized_network`, write the bytes. Our side is `build-engine`;
its compile stage does the same work, its whole time has export and hashing too. Memory is each process's peak resident
size, in which mapped weights count.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIDES = ("ours", "tensorrt")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints each round, then the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--capability", default="8.9")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=(*SIDES, "graph"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side is not None:
        print(json.dumps({"ours": ours, "tensorrt": tensorrt, "graph": graph}[options.side](options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run(options, "graph", folder)
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for index in range(options.rounds):
            for side in SIDES if index % 2 else reversed(SIDES):
                rounds[side].append(found := run(options, side, folder))
                print(side, json.dumps(found), flush=True)
    for measure in ("compile_seconds", "peak_memory_bytes", "engine_bytes"):
        mine, theirs = (statistics.median(found[measure] for found in rounds[side]) for side in SIDES)
        print(f"{measure}: {mine:,.4g} against {theirs:,.4g}, ratio {mine / theirs:.3f}")
    print(f"ours in all: {statistics.median(found['seconds'] for found in rounds['ours']):.1f} s")


def run(options: argparse.Namespace, side: str, folder: str) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.tensorrt_build", options.variant, "--side", side, "--folder", folder]
    for name in ("precision", "capability", "context", "chunk"):
        command += [f"--{name}", str(getattr(options, name))]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def _spec(options: argparse.Namespace) -> Any:
    from qwen_aot.engines.spec.build_spec import BuildSpec
    from qwen_aot.engines.spec.precisions import Precision
    from qwen_aot.engines.spec.targets import Target
    from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions

    return BuildSpec(
        target=Target.TENSORRT_RTX,
        precision=Precision(options.precision),
        max_context=options.context,
        prefill_chunk=options.chunk,
        tensorrt=TensorRtOptions(compute_capabilities=(options.capability,)),
    )


def graph(options: argparse.Namespace) -> dict[str, Any]:
    """Writes the ONNX file that our build would compile, for TensorRT's side."""
    import onnx_ir as ir

    from qwen_aot.engines import tensorrt as builder
    from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
    from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
    from qwen_aot.exporter.graph.trace import trace
    from qwen_aot.exporter.model.variants import VARIANTS
    from qwen_aot.exporter.weights.stitch import stitch
    from qwen_aot.runtime.bundle.manifest import cache_capacity

    spec, config = _spec(options), VARIANTS[options.variant]
    capacity = cache_capacity(options.context, options.chunk)
    dtype = ir.DataType[spec.combination.compute_type]
    lowered = builder.lower(trace(config, dtype, positions=capacity, capacity=capacity), spec)
    stitch(lowered, RandomCheckpoint(config), options.folder / DATA_FILE)
    save_graph(lowered, options.folder)
    return {}


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """`build-engine` on random weights."""
    start = time.perf_counter()
    from qwen_aot.engines.build import build_bundle
    from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint
    from qwen_aot.exporter.model.variants import VARIANTS

    out = options.folder / "bundle"
    report = build_bundle(RandomCheckpoint(VARIANTS[options.variant]), _spec(options), out)
    seconds = time.perf_counter() - start
    stages = {cost.stage: cost.seconds for cost in report.stages}
    result = {
        "compile_seconds": stages["compile"],
        "seconds": seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "engine_bytes": (out / report.manifest.engines.text.file).stat().st_size,
        "weight_bytes": report.manifest.engines.text.tensorrt.weight_bytes
        if report.manifest.engines.text.tensorrt is not None
        else 0,
        "stages": {name: round(value, 2) for name, value in stages.items()},
    }
    shutil.rmtree(out)
    return result


def tensorrt(options: argparse.Namespace) -> dict[str, Any]:
    """TensorRT alone."""
    import tensorrt_rtx as trt

    from qwen_aot.runtime.bundle.manifest import cache_capacity

    capacity = cache_capacity(options.context, options.chunk)
    start = time.perf_counter()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(options.folder / "model.onnx"))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    member = getattr(trt.ComputeCapability, f"SM{options.capability.replace('.', '')}")
    config.set_compute_capability(member, 0)
    for tokens in (options.chunk, 1):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            sizes = {"input_ids": (1, tokens), "position_ids": (1, tokens), "key_positions": (capacity,)}
            largest = sizes.get(tensor.name, tuple(1 if dim == -1 else dim for dim in tensor.shape))
            least = tuple(1 if dim == -1 else dim for dim in tensor.shape)
            typical = (min(1024, capacity),) if tensor.name == "key_positions" else largest
            profile.set_shape(tensor.name, least, typical, largest)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    (options.folder / "engine").write_bytes(engine)
    return {
        "compile_seconds": time.perf_counter() - start,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "engine_bytes": engine.nbytes,
    }


if __name__ == "__main__":
    main()
