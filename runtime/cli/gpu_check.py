"""`gpu-check`: everything that only a GPU can show, in one report to attach to a bug."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from qwen_aot.extras import install_command
from qwen_aot.runtime.bundle.flavours import FLAVOURS
from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY, PLUGIN_LIBRARY_VARIABLE
from qwen_aot.runtime.cli.check_steps import (
    Failure,
    Skip,
    Step,
    StepResult,
    has_passed,
    report_files,
    run_steps,
    write_report,
)
from qwen_aot.runtime.cli.command import EXIT_FAILED, VerbCommand, option
from qwen_aot.runtime.cli.console import print_json, show_logs, stdout, tell
from qwen_aot.runtime.cli.doctor import examine
from qwen_aot.runtime.cli.options import CONTEXT, GivenPath, json_option
from qwen_aot.runtime.cli.tables import say
from qwen_aot.runtime.cli.visible import visible, visible_line

if TYPE_CHECKING:
    from qwen_aot.engines.spec.tensorrt_options import Form
    from qwen_aot.exporter.checkpoint.base import Checkpoint

TINY = "tiny"
WITH_PLUGINS = "tensorrt"
REFERENCE = "build cpu"  # the step whose bundle the others are compared with
MAX_CONTEXT, CHUNK = 512, 128  # tokens
WINDOW, GREEDY = 128, 32  # tokens compared, and generated freely
SNR_DB = 30.0  # of the fp16 engine's logits and caches over the fp32 reference's: 3 % of noise
TEST_SECONDS = 3600
TESTS = Path(__file__).resolve().parents[2] / "tests"  # beside the packages in a clone; not in a wheel

# Target -> the module whose presence says that its library is installed.
MODULES = {**{target: flavour.module for target, flavour in FLAVOURS.items()}, "cuda": "onnxruntime"}


@click.command("gpu-check", cls=VerbCommand, context_settings=CONTEXT)
@option(
    "-o",
    "--output",
    "report",
    type=GivenPath(),
    default=Path("gpu-check"),
    help="REPORT.json and REPORT.md are written.",
    group="Main",
)
@option("--model", default=TINY, metavar="CHECKPOINT", help="A checkpoint, or a small random model.", group="Main")
@json_option
def command(report: Path, model: str, as_json: bool) -> None:
    """Build, test, compare and measure on this machine's GPU.

    \b
    Examples:
      qwen-aot gpu-check
      qwen-aot gpu-check -o report --model ./Qwen1.5-0.5B-Chat

    Builds a bundle with each of TensorRT-RTX, TensorRT and ONNX Runtime's CUDA provider that is installed (TensorRT's
    with the project's plugins, whose library is built for this GPU unless QWEN_AOT_PLUGIN_LIBRARY names it), runs the
    tests that need a GPU, compares each engine with the CPU's fp32 bundle (TensorRT's with Polygraphy too) and
    measures its speed. A step that fails doesn't end the others. Exits with 0 if at least one step ran on the GPU and
    none failed.
    """
    show_logs()
    report_files(report)  # before hours of work
    machine = examine()
    with tempfile.TemporaryDirectory(prefix="qwen-aot-gpu-check-") as folder:
        results = run_steps(plan(machine, model, Path(folder)), _progress)
    files = write_report(report, machine, results)
    if as_json:
        print_json({"passed": has_passed(results), "report": [str(file) for file in files], "steps": _plain(results)})
    else:
        _show(results, files)
    if not has_passed(results):
        click.get_current_context().exit(EXIT_FAILED)


def plan(machine: Mapping[str, Any], model: str, folder: Path) -> list[Step]:
    """The steps for this machine; without a GPU the first one fails and says what is missing.

    Args:
        machine: of `runtime.cli.doctor.examine`.
        model: a checkpoint's place, or `tiny`.
        folder: for bundles; removed afterwards.
    """
    gpu = "find a GPU"
    steps = [
        Step(gpu, False, lambda: _find_gpu(machine)),
        Step(REFERENCE, False, lambda: _build_reference(model, folder), needs=(gpu,)),
        Step("gpu tests", True, _run_tests, needs=(gpu,)),
        Step("measure plugin kernels", True, _measure_kernels, needs=(gpu,)),
    ]
    for target in MODULES:
        steps += _steps_of(target, model, folder, gpu)
    return steps


def _steps_of(target: str, model: str, folder: Path, gpu: str) -> list[Step]:
    library, build = f"find {target}", f"build {target}"
    plugins = Step("build plugin library", False, lambda: _build_plugins(folder), needs=(library,))
    return [
        Step(library, False, lambda: _find_library(target), needs=(gpu,)),
        *([plugins] if target == WITH_PLUGINS else []),
        Step(build, False, lambda: _build_engine(model, target, folder), needs=(library,)),
        Step(f"compare {target}", True, lambda: _compare(folder, target), needs=(REFERENCE, build)),
        *_polygraphy_steps(target, model, folder, build),
        Step(f"measure {target}", True, lambda: _measure(folder / target), needs=(build,)),
    ]


def _polygraphy_steps(target: str, model: str, folder: Path, build: str) -> list[Step]:
    """Polygraphy runs TensorRT's engines; what ONNX Runtime runs on CUDA has no engine."""
    if target == "cuda":
        return []
    name = f"compare {target} with Polygraphy"
    return [Step(name, True, lambda: _compare_with_polygraphy(model, folder, target), needs=(REFERENCE, build))]


def _find_gpu(machine: Mapping[str, Any]) -> Mapping[str, Any]:
    if not machine["gpus"]:
        raise Failure(
            "nothing could be checked: neither nvidia-smi nor CUDA finds a GPU. An NVIDIA GPU and its driver are "
            f"needed, and one of TensorRT-RTX, TensorRT, or ONNX Runtime for CUDA (`{install_command('cuda')}`)",
            {},
        )
    return {"gpus": machine["gpus"]}


def _find_library(target: str) -> Mapping[str, Any]:
    module = MODULES[target]
    if importlib.util.find_spec(module) is None:
        raise Skip(f"{module} isn't installed")
    if target == "cuda":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise Skip(f"the installed onnxruntime has no CUDAExecutionProvider: {install_command('cuda')}")
    return {"module": module}


def _open(model: str) -> Checkpoint:
    from qwen_aot.exporter.checkpoint.open import open_checkpoint
    from qwen_aot.exporter.checkpoint.synthetic import RandomCheckpoint

    if model != TINY:
        return open_checkpoint(model)
    from qwen_aot.exporter.model.config import ModelConfig

    config = ModelConfig(
        model_type="qwen2",
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2 * MAX_CONTEXT,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    return RandomCheckpoint(config, 0, TINY)


def _build_reference(model: str, folder: Path) -> Mapping[str, Any]:
    """The CPU's fp32 bundle, in the form that the installed ONNX Runtime can run."""
    target = _reference_target()
    return {"target": target, **_build(model, target, "fp32", folder / "reference")}


def _reference_target() -> str:
    """Which target the CPU provider here can run in fp32: that of onnxruntime-gpu is too old for the cpu target."""
    from qwen_aot.errors import EngineMismatchError
    from qwen_aot.runtime.backends.ort.devices import DEVICES, import_onnxruntime

    try:
        import_onnxruntime(DEVICES["cpu"])
    except EngineMismatchError:
        return "cuda"
    return "cpu"


def _build_plugins(folder: Path) -> Mapping[str, Any]:
    """The plugins' library for this machine's GPU, unless the environment names one."""
    from qwen_aot.errors import BuildError
    from qwen_aot.plugins.library import build_library, find_cmake, tensorrt_headers
    from qwen_aot.plugins.variants import SMS
    from qwen_aot.runtime.backends.cuda.runtime import find_device, load_cuda

    if named := os.environ.get(PLUGIN_LIBRARY_VARIABLE):
        return {"library": named, "named_by": PLUGIN_LIBRARY_VARIABLE}
    sm = find_device(load_cuda()).compute_capability
    if sm not in SMS:
        raise Skip(f"there are no kernels for SM {sm}; there are for {', '.join(SMS)}")
    if importlib.util.find_spec("triton") is None:
        raise Skip(f"triton isn't installed: {install_command('plugins')}")
    out = folder / "plugins"
    try:
        find_cmake()
        headers = tensorrt_headers(out / "build")
    except BuildError as error:
        raise Skip(str(error)) from error
    library = build_library(out, (sm,), tensorrt_include=headers)
    return {"library": library.name, "sm": sm, "bytes": library.stat().st_size}


def _build_engine(model: str, target: str, folder: Path) -> Mapping[str, Any]:
    """The target's own form; where it has plugins and there is no library of them, native layers."""
    out, library = folder / target, folder / "plugins" / PLUGIN_LIBRARY
    if target != WITH_PLUGINS or os.environ.get(PLUGIN_LIBRARY_VARIABLE):
        return _build(model, target, "fp16", out)
    if library.is_file():
        return {"forms": "plugin", **_build(model, target, "fp16", out, plugin_library=library)}
    return {"forms": "native", **_build(model, target, "fp16", out, forms="native")}


def _build(
    model: str, target: str, precision: str, out: Path, *, forms: Form | None = None, plugin_library: Path | None = None
) -> Mapping[str, Any]:
    """Builds a bundle; `forms`: who computes attention and experts of a TensorRT engine, plugins of a library."""
    from qwen_aot.engines.build import build_bundle
    from qwen_aot.engines.spec.build_spec import BuildSpec
    from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
    from qwen_aot.runtime.backends.cuda.runtime import find_device, load_cuda

    # Its default is three generations of cards; this machine's may be another.
    here = (find_device(load_cuda()).compute_capability,) if target == "tensorrt-rtx" else ()
    spec = BuildSpec(
        target=target,  # type: ignore[arg-type]  # BuildSpec takes strings
        precision=precision,  # type: ignore[arg-type]
        max_context=MAX_CONTEXT,
        prefill_chunk=CHUNK,
        max_batch=2,
        tensorrt=TensorRtOptions(compute_capabilities=here, attention=forms, moe=forms, plugin_library=plugin_library),
    )
    with _open(model) as checkpoint:
        report = build_bundle(checkpoint, spec, out)
    return {
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "bundle_bytes": sum(entry.bytes for entry in report.manifest.files.values()),
    }


def _compare(folder: Path, target: str) -> Mapping[str, Any]:
    """Scores an engine against the CPU's fp32 bundle, teacher-forced."""
    import numpy as np

    from qwen_aot.engines.verify.engine_reference import EngineReference
    from qwen_aot.engines.verify.scores import Limits, bounds_for, verify, windows
    from qwen_aot.runtime.backends.open import open_engine
    from qwen_aot.runtime.backends.ort.devices import DEVICES
    from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine
    from qwen_aot.runtime.bundle.load import load_bundle

    reference = load_bundle(folder / "reference")
    version = DEVICES[reference.manifest.target].minimum_version
    on_cpu = replace(DEVICES["cpu"], minimum_version=version)
    # This very run built it, of a library that it built or that the environment names.
    engine = open_engine(load_bundle(folder / target), allow_bundle_code=True)
    with engine as ours, OnnxRuntimeEngine(reference, device=on_cpu) as theirs:
        ids = np.random.default_rng(0).integers(0, ours.manifest.model.vocab_size, 2 * WINDOW).tolist()
        limits = Limits(bounds_for(ours.manifest.engines.text.precision))
        result = verify(ours, EngineReference(theirs), windows(ids, WINDOW, 2), limits, greedy_tokens=GREEDY)
    details = result.to_json()
    failed = [check.name for check in result.checks if not check.has_passed]
    if failed:
        raise Failure(f"differs from the CPU bundle: {', '.join(failed)}", details)
    return details


def _compare_with_polygraphy(model: str, folder: Path, target: str) -> Mapping[str, Any]:
    """One prefill step of the engine against the CPU's fp32 bundle; of native layers, which the runner can bind."""
    import numpy as np

    from qwen_aot.engines.verify.compare_engine import compare_in_process
    from qwen_aot.errors import BuildError, EngineMismatchError
    from qwen_aot.runtime.bundle.load import read_manifest

    if importlib.util.find_spec("polygraphy") is None:
        raise Skip(f"polygraphy isn't installed: {install_command('verify')}")
    engine = folder / target
    manifest = read_manifest(engine)
    facts = manifest.engines.text.tensorrt
    if facts is not None and facts.plugins is not None:
        engine = folder / f"{target}-native"
        try:
            _build(model, target, "fp16", engine, forms="native")
        except BuildError as error:
            raise Skip(f"its runner can't bind plugins' caches, and native layers can't be built: {error}") from error
    ids = np.random.default_rng(0).integers(0, manifest.model.vocab_size, CHUNK).tolist()
    try:
        details = compare_in_process(engine, folder / "reference", ids, SNR_DB)
    except EngineMismatchError as error:
        raise Skip(str(error)) from error
    if failed := details["failed"]:
        raise Failure(f"differs from the CPU bundle by Polygraphy's comparison: {', '.join(failed)}", details)
    return details


def _measure(bundle: Path) -> Mapping[str, Any]:
    from qwen_aot.runtime.cli.bench_rounds import measure_bundle

    return measure_bundle(bundle, prompt_tokens=256, gen_tokens=128, rounds=5, allow_bundle_code=True)


def _run_tests(tests: Path = TESTS) -> Mapping[str, Any]:
    """The tests marked `gpu`, in a process of their own: a fault of the driver ends that one only."""
    if not tests.is_dir():
        raise Skip("the tests aren't here (a wheel has none): run this from a clone of the repository")
    if importlib.util.find_spec("pytest") is None:
        raise Skip(f"pytest isn't installed: {install_command('dev')}")
    # Exit code 5: no test was collected. -rs lists what skipped and why.
    arguments = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=TEST_SECONDS, check=False, cwd=tests.parent
    )
    output = (done.stdout + done.stderr)[-20_000:]
    details = {"exit_code": done.returncode, "output": output}
    if done.returncode == 5:
        raise Skip("no test is marked gpu")
    if done.returncode != 0:
        raise Failure(f"pytest exited with {done.returncode}", details)
    if " passed" not in output:
        raise Skip(f"every gpu test skipped itself: {output[-2000:]}")
    return details


def _measure_kernels(tests: Path = TESTS) -> Mapping[str, Any]:
    """The benchmark of the plugins' kernels, in a process of its own."""
    if not tests.is_dir():
        raise Skip("the benchmark isn't here (a wheel has none): run this from a clone of the repository")
    for module in ("torch", "triton"):
        if importlib.util.find_spec(module) is None:
            raise Skip(f"{module} isn't installed: {install_command('dev')}")
    arguments = [sys.executable, "-m", "tests.bench.plugin_kernels", "--model", "qwen1.5-0.5b"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=TEST_SECONDS, check=False, cwd=tests.parent
    )
    details = {"exit_code": done.returncode, "output": (done.stdout + done.stderr)[-20_000:]}
    if "no CUDA device" in done.stderr or "--device" in done.stderr:
        raise Skip(done.stderr.strip())
    if done.returncode != 0:
        raise Failure(f"the benchmark exited with {done.returncode}", details)
    return details


def _plain(results: list[StepResult]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]


def _progress(result: StepResult) -> None:
    tell(f"{result.name}: {result.outcome} ({result.seconds:.1f} s) {result.message.partition(chr(10))[0]}")


def _show(results: list[StepResult], files: tuple[Path, Path]) -> None:
    console = stdout()
    failed = [result for result in results if result.outcome == "failed"]
    for result in failed:
        say(console, Text.assemble((visible_line(result.name), "bold red"), f": {visible(result.message)}"))
    if has_passed(results):
        say(console, Text("every step that could run passed", style="bold green"))
    elif not failed:
        verdict = "no step ran on the GPU", "bold red"
        say(console, Text.assemble(verdict, ": install what the skipped steps name"))
    say(console, f"report: {files[0]} and {files[1]}")
