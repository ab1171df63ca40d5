"""Compares a step of a TensorRT engine with the CPU reference's: Polygraphy's runners run both, and its metric judges.

Polygraphy binds itself to TensorRT or to TensorRT-RTX when it is imported, as `POLYGRAPHY_USE_TENSORRT_RTX` says then.
So each comparison is a process of its own (`python -m qwen_aot.engines.verify.compare_engine`), and both flavours can
be compared in one program. A fault of the driver ends that process only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_aot.engines.verify.per_layer import MarkedGraph, onnxruntime_runner, step_feeds
from qwen_aot.errors import BuildError, DeployError, EngineMismatchError
from qwen_aot.runtime.bundle.load import read_manifest
from qwen_aot.runtime.bundle.manifest import Manifest
from qwen_aot.runtime.engine.io_table import image_width

SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"  # Polygraphy's own, "1" or "0"
_MACHINE_LACKS = 3  # exit code of the process where this machine lacks something
_SECONDS = 900  # for loading, compiling kernels just in time and one step
_PRESENT = "present."
_SLOTS = 2  # the axis of the cache's slots


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """One output of the step.

    Attributes:
        name: the tensor's.
        snr_db: mean square of the reference over that of the difference, in decibels.
        has_passed: whether that is at least the bound.
    """

    name: str
    snr_db: float
    has_passed: bool


@dataclass(frozen=True, slots=True)
class EngineComparison:
    """The comparison of logits and of every cache tensor's written slots, after one prefill step."""

    outputs: tuple[OutputComparison, ...]
    bound_db: float
    tokens: int
    library: str  # the module that ran the engine

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of outputs under the bound."""
        return tuple(output.name for output in self.outputs if not output.has_passed)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"failed": list(self.failed), **asdict(self)}


def require_declared_alias(manifest: Manifest) -> None:
    """Refuses an engine that Polygraphy's runner can't bind.

    It gives each output memory of its own, unless the engine declares that it lies where an input does. TensorRT's own
    cache layer declares it; the attention plugin, which must have present where past is, doesn't.

    Raises:
        EngineMismatchError: there is such a plugin; says what can be compared.
    """
    assert manifest.engines.text.tensorrt is not None
    plugins = manifest.engines.text.tensorrt.plugins
    if plugins is not None:
        raise EngineMismatchError(
            f"the engine has the plugins {', '.join(plugins.ops)}, and Polygraphy's runner gives an attention plugin's "
            "present other memory than past; accepted: an engine built with --attention native --moe native "
            "and without --linear plugin"
        )


def compare_in_process(engine: Path, reference: Path, token_ids: Sequence[int], bound_db: float) -> Mapping[str, Any]:
    """Compares in a new process, in which Polygraphy uses the library of the engine's target.

    Args:
        engine: a bundle with a TensorRT engine of TensorRT's own layers, which this machine built: Polygraphy lets it
            run whatever code for the host it carries.
        reference: a bundle of the same checkpoint whose graph ONNX Runtime's CPU provider runs.
        token_ids: the prompt, at most `prefill_chunk` tokens.
        bound_db: the least signal-to-noise ratio of every output.

    Returns:
        `EngineComparison.to_json`.

    Raises:
        EngineMismatchError: Polygraphy's runner can't bind the engine, or this machine lacks what it needs.
        BuildError: the process failed; ends with what it wrote.
    """
    manifest = read_manifest(engine)
    require_declared_alias(manifest)
    switch = "1" if manifest.target == "tensorrt-rtx" else "0"
    with tempfile.TemporaryDirectory(prefix="qwen-aot-compare-") as folder:
        result = Path(folder) / "result.json"
        tokens = ",".join(map(str, token_ids))
        options = ["--tokens", tokens, "--bound", str(bound_db), "-o", str(result)]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "qwen_aot.engines.verify.compare_engine",
                str(engine.resolve()),
                str(reference.resolve()),
                *options,
            ],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            cwd=Path(__file__).parents[3],
            env={**os.environ, SWITCH: switch, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
        )
        if done.returncode == _MACHINE_LACKS:
            raise EngineMismatchError(done.stderr.strip())
        if done.returncode != 0:
            raise BuildError(
                f"the comparison with Polygraphy exited with {done.returncode}: {(done.stdout + done.stderr)[-8000:]}"
            )
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def compare_engine(engine: Path, reference: Path, token_ids: Sequence[int], bound_db: float) -> EngineComparison:
    """Compares in this process, which must have been started with the switch for the engine's target.

    Args:
        engine: see `compare_in_process`.
        reference: see `compare_in_process`.
        token_ids: see `compare_in_process`.
        bound_db: see `compare_in_process`.

    Raises:
        BuildError: an output is missing on a side, or a runner failed.
        EngineMismatchError: there is no CUDA runtime library.
    """
    _show_cuda_runtime()
    from polygraphy.backend.trt import EngineFromPath, TrtRunner
    from polygraphy.comparator import Comparator, RunResults, SnrCompareFunc
    from polygraphy.exception import PolygraphyException
    from polygraphy.mod.trt_importer import tensorrt_module_and_version_string

    manifests = read_manifest(reference), read_manifest(engine)
    entries = manifests[0].engines.text, manifests[1].engines.text
    graph, plan = reference / entries[0].file, engine / entries[1].file
    prefill = [profile.name for profile in entries[1].profiles].index("prefill")
    on_cpu, _ = onnxruntime_runner(MarkedGraph(graph, graph.read_bytes()), ("CPUExecutionProvider",), "reference")
    runners = on_cpu, TrtRunner(EngineFromPath(str(plan)), name="engine", optimization_profile=prefill)
    results = RunResults()
    try:
        for runner, manifest in zip(runners, manifests, strict=True):
            results.extend(Comparator.run([runner], data_loader=[_feeds(manifest, token_ids)]))
        results = Comparator.postprocess(results, lambda outputs: _written(outputs, len(token_ids)))
        accuracy = Comparator.compare_accuracy(results, compare_func=SnrCompareFunc(bound_db))
    except PolygraphyException as error:
        raise BuildError(f"Polygraphy couldn't compare {plan} with {graph}: {error}") from error
    ((_, (compared,)),) = accuracy[0].items()  # of one judge, one pair of runners, one set of inputs
    if missing := {tensor.name for tensor in entries[1].outputs} - compared.keys():
        raise BuildError(f"Polygraphy didn't compare {', '.join(sorted(missing))}: {graph} lacks them")
    outputs = tuple(OutputComparison(name, float(result.snr), bool(result)) for name, result in compared.items())
    library = tensorrt_module_and_version_string().partition(">")[0]
    return EngineComparison(outputs, bound_db, len(token_ids), library)


def _show_cuda_runtime() -> None:
    """Adds the CUDA runtime library's folder to where Polygraphy looks, which knows those of CUDA 12 only."""
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        path = load_nvidia_dynamic_lib("cudart").abs_path
    except DynamicLibNotFoundError as error:
        raise EngineMismatchError(
            "Polygraphy needs the CUDA runtime library (libcudart.so), and there is none: `pip install "
            "nvidia-cuda-runtime`, or add its folder to LD_LIBRARY_PATH"
        ) from error
    known = os.environ.get("LD_LIBRARY_PATH", "")
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (known, str(Path(path or "").parent))))


def _feeds(manifest: Manifest, token_ids: Sequence[int]) -> dict[str, Any]:
    """The step's inputs, with a cache of the capacity that the graph fixes, if it does."""
    past = next(tensor for tensor in manifest.engines.text.inputs if tensor.name == "past_key_values.0.key")
    _, heads, capacity, head_dim = past.shape
    return step_feeds(
        token_ids,
        manifest.model.num_hidden_layers,
        int(heads),
        int(head_dim),
        capacity if isinstance(capacity, int) else None,
        manifest.engines.text.rotary_length,
        image_width(manifest),
    )


def _written(outputs: Any, count: int) -> Any:
    """Drops the slots behind the step's tokens, of which each side has its own number."""
    for name in list(outputs):
        if name.startswith(_PRESENT):
            outputs[name] = outputs[name].take(range(count), axis=_SLOTS)
    return outputs


def main() -> int:
    """The process that `compare_in_process` starts. Exit codes: 0 compared, 1 failed, 3 the machine lacks something."""
    parser = argparse.ArgumentParser(prog="python -m qwen_aot.engines.verify.compare_engine")
    parser.add_argument("engine", type=Path, help="bundle with a TensorRT engine")
    parser.add_argument("reference", type=Path, help="bundle whose graph the CPU runs")
    parser.add_argument("--tokens", required=True, help="the prompt's token ids, with commas between")
    parser.add_argument("--bound", type=float, required=True, help="least signal-to-noise ratio, dB")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    token_ids = [int(token) for token in arguments.tokens.split(",")]
    try:
        comparison = compare_engine(arguments.engine, arguments.reference, token_ids, arguments.bound)
    except DeployError as error:
        print(error, file=sys.stderr)
        return _MACHINE_LACKS if isinstance(error, EngineMismatchError) else 1
    arguments.output.write_text(json.dumps(comparison.to_json()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
