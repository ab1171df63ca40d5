"""`doctor`: what this machine has, and what each target lacks on it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from qwen_aot.errors import BuildError, EngineMismatchError
from qwen_aot.extras import install_command, obstacle
from qwen_aot.jetson import Jetson, find_jetson
from qwen_aot.machine import available_memory_bytes, free_disk_bytes, physical_memory_bytes, usable_cores
from qwen_aot.runtime.backends.cpu.kernels import find_library, require_library, why_not_by_default
from qwen_aot.runtime.bundle.flavours import FLAVOURS, Flavour
from qwen_aot.runtime.bundle.plugin_library import require_plugin_library
from qwen_aot.runtime.cli.command import VerbCommand
from qwen_aot.runtime.cli.console import count, print_json, size, stdout
from qwen_aot.runtime.cli.options import CONTEXT, json_option
from qwen_aot.runtime.cli.tables import print_facts, print_table, say
from qwen_aot.version import __version__

NO_GPU = "no NVIDIA GPU or driver"
_CUDA_BINDINGS = "cuda-bindings"
_UPDATE_DRIVER = "update the driver to one of CUDA 13 (580 or later)"
RUNTIME_PACKAGES = ("click", "jinja2", "numpy", "rich", "tokenizers")
# Flags of /proc/cpuinfo that decide which integer kernels ONNX Runtime takes.
CPU_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")


@dataclass(frozen=True, slots=True)
class Need:
    """A package that a target needs, from which version on, and the extra that brings it."""

    package: str
    extra: str
    at_least: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Lack:
    """Something that a task needs and that isn't here.

    Attributes:
        name: of it, in a list.
        problem: a sentence.
        remedy: what to run or do; several packages may share one.
    """

    name: str
    problem: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """Problem and remedy in one sentence."""
        return ": ".join(filter(None, (self.problem, self.remedy)))


@dataclass(frozen=True, slots=True)
class TargetNeeds:
    """What building for a target and running it need, and compiling there what another machine prepared.

    Attributes:
        compile: empty where a target's bundles are done without.
    """

    build: tuple[Need, ...]
    run: tuple[Need, ...]
    compile: tuple[Need, ...] = ()
    build_on_gpu: bool = False
    run_on_gpu: bool = False


_EXPORT = tuple(Need(name, "build") for name in ("torch", "onnx", "onnx-ir", "onnxscript", "ml-dtypes"))
_COMPILE = tuple(Need(name, "compile") for name in ("onnx", "onnx-ir", "ml-dtypes"))
_ONNXRUNTIME = Need("onnxruntime", "cpu", (1, 32))


def _needs_of(flavour: Flavour) -> TargetNeeds:
    library = Need(flavour.package, flavour.target, flavour.at_least)
    return TargetNeeds(
        build=(*_EXPORT, library),
        run=(library, Need("cuda-bindings", flavour.target, flavour.cuda_at_least)),
        compile=(*_COMPILE, library),
        build_on_gpu=not flavour.builds_for_others,
        run_on_gpu=True,
    )


TARGETS: Mapping[str, TargetNeeds] = {
    "cpu": TargetNeeds(build=(*_EXPORT, _ONNXRUNTIME), run=(_ONNXRUNTIME,)),
    "cuda": TargetNeeds(
        build=_EXPORT,
        run=(Need("onnxruntime-gpu", "cuda", (1, 31)), Need("cuda-bindings", "cuda", (13,))),
        run_on_gpu=True,
    ),
    **{target: _needs_of(flavour) for target, flavour in FLAVOURS.items()},
}
OPTIONAL = (Need("gguf", "build"), Need("transformers", "verify"), Need("safetensors", "verify"))


@click.command("doctor", cls=VerbCommand, context_settings=CONTEXT)
@json_option
def command(as_json: bool) -> None:
    """Show versions, hardware and what each target lacks here.

    \b
    Examples:
      qwen-aot doctor
      qwen-aot doctor --json > machine.json
    """
    facts = examine()
    if as_json:
        print_json(facts)
    else:
        _show(facts, lacks_of_targets(has_gpu=bool(facts["gpus"])))


def examine() -> dict[str, Any]:
    """Everything `doctor` reports, as plain JSON values."""
    needs = {need.package: need for row in TARGETS.values() for need in (*row.build, *row.run)}
    needs |= {need.package: need for need in OPTIONAL}
    found_gpus, jetson = gpus(), find_jetson()
    return {
        "qwen_aot": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu(),
        "own_kernels": own_kernels(),
        "memory": {
            "total_bytes": physical_memory_bytes(),
            "available_bytes": available_memory_bytes(),
        },
        "free_disk_bytes": free_disk_bytes(Path.cwd()),
        "jetson": None if jetson is None else _jetson_facts(jetson),
        "gpus": found_gpus,
        "packages": {name: version(name) for name in RUNTIME_PACKAGES},
        "extras": {
            name: {
                "version": version(name),
                "extra": need.extra,
                "lacks": missing.text if (missing := lack(need)) else None,
            }
            for name, need in needs.items()
        },
        "targets": {
            target: {f"{task}_lacks": [lack.text for lack in missing] for task, missing in tasks.items()}
            for target, tasks in lacks_of_targets(has_gpu=bool(found_gpus)).items()
        },
    }


def _jetson_facts(jetson: Jetson) -> dict[str, Any]:
    jetpack = jetson.jetpack
    return {
        "model": jetson.model,
        "chip": jetson.chip or None,
        "jetson_linux": None if jetson.release is None else ".".join(map(str, jetson.release)),
        "jetpack": None if jetpack is None else jetpack.name,
    }


def version(package: str) -> str | None:
    """An installed distribution's version; of TensorRT, which JetPack installs without pip's records, the module's."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _version_of_module(package) if package == "tensorrt" else None


def _version_of_module(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except (ImportError, OSError, AttributeError):  # OSError: the bindings are there, the libraries aren't
        return None


def lacks_of_targets(*, has_gpu: bool) -> dict[str, dict[str, list[Lack]]]:
    """Target -> task (build, compile where there is such a thing, run) -> what is missing for it."""
    found: dict[str, dict[str, list[Lack]]] = {}
    for target, row in TARGETS.items():
        builds = has_gpu or not row.build_on_gpu
        found[target] = {"build": _lacks(row.build, has_gpu=builds) + _lacks_plugins(target)}
        if row.compile:
            found[target]["compile"] = _lacks(row.compile, has_gpu=builds) + _lacks_plugins(target)
        found[target]["run"] = _lacks(row.run, has_gpu=has_gpu or not row.run_on_gpu)
    return found


def _lacks(needs: tuple[Need, ...], *, has_gpu: bool) -> list[Lack]:
    missing = [found for need in needs if (found := lack(need))]
    return missing if has_gpu else [*missing, Lack("a GPU", NO_GPU)]


def _lacks_plugins(target: str) -> list[Lack]:
    """The plugins' library, if the target computes attention and experts with it and none is named."""
    if target not in FLAVOURS or not FLAVOURS[target].has_plugins:
        return []
    try:
        require_plugin_library(option=None)
    except BuildError as error:
        return [Lack("the plugins' library", "", str(error))]
    return []


def lack(need: Need) -> Lack | None:
    """What is missing for a need and how to get it; None if it is met."""
    found = version(need.package)
    if found is None:
        return Lack(need.package, f"{need.package} isn't installed", _remedy(need))
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[: len(need.at_least)])
    if numbers < need.at_least:
        oldest = ".".join(map(str, need.at_least))
        remedy = _remedy(need, upgrade=True)
        return Lack(
            f"{need.package} {oldest} or newer", f"{need.package} is {found}, {oldest} or newer is needed", remedy
        )
    return _newer_than_the_driver(need, found) if need.package == _CUDA_BINDINGS else None


def _remedy(need: Need, *, upgrade: bool = False) -> str:
    """CUDA's bindings come by pip whatever stands in the way of the library beside them; the driver must run them."""
    if need.package != _CUDA_BINDINGS:
        return obstacle(need.extra) or install_command(need.extra, upgrade=upgrade)
    driver = driver_cuda()
    if driver is not None and driver[0] < need.at_least[0]:
        return _UPDATE_DRIVER
    return install_command("tensorrt" if find_jetson() is not None else need.extra, upgrade=upgrade)


def _newer_than_the_driver(need: Need, bindings: str) -> Lack | None:
    """CUDA's bindings of a major version that the driver doesn't run; None: it does, or there is no driver."""
    driver = driver_cuda()
    major = int(re.match(r"\d*", bindings)[0] or 0)  # type: ignore[index]  # it matches whatever there is
    if driver is None or major <= driver[0]:
        return None
    return Lack(
        f"cuda-bindings {driver[0]}",
        f"cuda-bindings is {bindings}, and the driver runs CUDA {driver[0]}.{driver[1]}",
        f"pip install 'cuda-bindings=={driver[0]}.*'" if driver[0] >= need.at_least[0] else _UPDATE_DRIVER,
    )


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver runs: (12, 6); None without a driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed or not number.value else (number.value // 1000, number.value % 1000 // 10)


def gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as the driver's tool lists them, or the one that CUDA finds; empty without a driver."""
    return _gpus_of_tool() or _gpu_of_cuda()


def _gpu_of_cuda() -> list[dict[str, str]]:
    """Where nvidia-smi is missing or doesn't know, as on Jetsons of JetPack 6 and before; needs CUDA's bindings."""
    from qwen_aot.runtime.backends.cuda.runtime import find_device, load_cuda

    try:
        device = find_device(load_cuda())
    except EngineMismatchError:
        return []
    return [
        {
            "name": device.name,
            "compute_cap": device.compute_capability,
            "memory.total": f"{device.total_bytes >> 20} MiB",
            "driver_version": "unknown",
        }
    ]


def _gpus_of_tool() -> list[dict[str, str]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    fields = ("name", "compute_cap", "memory.total", "driver_version")
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in listing.splitlines()]
    return [gpu for gpu in found if re.fullmatch(r"\d+\.\d+", gpu.get("compute_cap", ""))]


def cpu() -> dict[str, Any]:
    """The processor and its cores."""
    return {
        **processor(),
        "machine": platform.machine(),
        "logical_cores": os.cpu_count(),
        "threads": usable_cores(),
    }


def own_kernels() -> dict[str, Any]:
    """The library of own CPU kernels that a bundle of target cpu would run by here, or why there is none."""
    from qwen_aot.plugins.cpu.build import is_stale

    path = find_library()
    facts: dict[str, Any] = {
        "library": None if path is None else str(path),
        "version": None,
        "instructions": None,
        "is_stale": path is not None and path.is_file() and is_stale(path),
    }
    try:
        library = require_library()
    except EngineMismatchError as error:
        return {**facts, "problem": str(error)}
    why = why_not_by_default(library)
    problem = None if why is None else f"ONNX Runtime's are used: {why}"
    return {**facts, "version": library.version, "instructions": library.instructions, "problem": problem}


def processor() -> dict[str, Any]:
    """The processor's name, and the features that decide which kernels run."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "features": [feature for feature in CPU_FEATURES if feature in present],
    }


def _show(facts: Mapping[str, Any], lacking: Mapping[str, Mapping[str, Sequence[Lack]]]) -> None:
    console = stdout()
    processor, kernels, memory = facts["cpu"], facts["own_kernels"], facts["memory"]
    jetson = find_jetson()
    board = [] if jetson is None else [("board", jetson.text)]
    listed = [f"{gpu['name']} (SM {gpu['compute_cap']}, driver {gpu['driver_version']})" for gpu in facts["gpus"]]
    print_facts(
        console,
        [
            ("qwen-aot", f"{facts['qwen_aot']} on Python {facts['python']}"),
            ("system", facts["system"]),
            *board,
            ("cpu", f"{processor['name']}, {count(processor['logical_cores'], 'logical core')}"),
            ("threads", f"{processor['threads']} by default (physical cores we may use)"),
            ("cpu features", ", ".join(processor["features"]) or "none that matter here"),
            ("own kernels", _own_kernels_text(kernels)),
            ("memory", f"{size(memory['available_bytes'])} available of {size(memory['total_bytes'])}"),
            ("free disk", size(facts["free_disk_bytes"])),
            ("gpus", ", ".join(listed) or NO_GPU),
        ],
        title="machine",
    )
    console.print()
    own = [(name, found or Text("missing", style="red"), "") for name, found in facts["packages"].items()]
    others = [
        (name, entry["version"] or Text("not installed", style="yellow"), entry["extra"])
        for name, entry in facts["extras"].items()
    ]
    print_table(console, ("package", "version", "extra"), own + others, title="packages")
    console.print()
    states = [
        (f"{target} {task}", f"lacks {_names(missing)}" if missing else Text("ready", style="green"))
        for target, tasks in lacking.items()
        for task, missing in tasks.items()
    ]
    print_facts(console, states, title="targets")
    found = [lack for tasks in lacking.values() for missing in tasks.values() for lack in missing]
    remedies = dict.fromkeys(lack.remedy for lack in found if lack.remedy)
    if remedies:
        console.print()
    for remedy in remedies:
        brought = dict.fromkeys(lack.name for lack in found if lack.remedy == remedy)
        say(console, f"{', '.join(brought)}: {remedy}")


def _own_kernels_text(kernels: Mapping[str, Any]) -> str:
    text: str = kernels["problem"] or f"{kernels['library']}, using {kernels['instructions']}"
    if not kernels["is_stale"]:
        return text
    return f"{text}; it was compiled of other sources than this package's: `python -m qwen_aot.plugins.cpu.build`"


def _names(missing: Iterable[Lack]) -> str:
    return ", ".join(lack.name for lack in missing)
