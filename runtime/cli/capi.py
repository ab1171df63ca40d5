"""`capi`: builds the C library and installs it where a C or C++ program finds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from qwen_aot.runtime.cli.command import VerbCommand, option
from qwen_aot.runtime.cli.console import print_json, progress_on_stderr, size, stdout
from qwen_aot.runtime.cli.options import CONTEXT, GivenPath, json_option
from qwen_aot.runtime.cli.tables import say


@click.command("capi", cls=VerbCommand, context_settings=CONTEXT)
@option(
    "--prefix", required=True, type=GivenPath(), help="Folder that gets include, lib and lib/pkgconfig.", group="Main"
)
@option(
    "--portable",
    is_flag=True,
    help="Compile with ziglang for every Linux with glibc 2.31 or later.  [default: the system's compiler]",
    group="Main",
)
@option(
    "--processor",
    type=click.Choice(["x86_64", "aarch64"]),
    help="What it runs on; another than this machine's takes --portable.  [default: this machine's]",
    group="Main",
)
@option(
    "--tensorrt-include",
    type=GivenPath(exists=True),
    help="Folder of NvInferRuntime.h: builds the backend for TensorRT too.",
    group="TensorRT",
)
@option("--tensorrt-rtx", is_flag=True, help="The headers there are those of TensorRT-RTX.", group="TensorRT")
@option("--jobs", type=click.IntRange(1), help="Processes.  [default: one for each core]", group="Machine")
@json_option
def command(
    prefix: Path,
    portable: bool,
    processor: str | None,
    tensorrt_include: Path | None,
    tensorrt_rtx: bool,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Build the C library for programs in C and C++.

    \b
    Examples:
      qwen-aot capi --prefix ./qwen_aot
      qwen-aot capi --prefix ./jetson --portable --processor aarch64

    libqwen_aot is installed under a prefix, and beside it libqwen_aot_cpu.so, own kernels for the CPU that it finds
    there. Programs are compiled with what lib/pkgconfig/qwen_aot.pc or find_package(qwen_aot) says; docs/capi.md goes
    on from there. Needs cmake and a C++ compiler.
    """
    if tensorrt_rtx and tensorrt_include is None:
        raise click.UsageError("--tensorrt-rtx says whose headers --tensorrt-include names; give that too")
    from qwen_aot.runtime.capi.build import install_library

    with progress_on_stderr() as show:
        done = install_library(
            prefix,
            processor=processor,
            is_portable=portable,
            tensorrt_include=tensorrt_include,
            is_tensorrt_rtx=tensorrt_rtx,
            jobs=jobs,
            on_progress=show,
        )
    bytes_ = done.shared.stat().st_size
    runtime = _onnxruntime_library()
    if as_json:
        print_json(
            {
                "prefix": str(done.prefix),
                "header": str(done.header),
                "shared": str(done.shared),
                "shared_bytes": bytes_,
                "static": str(done.static),
                "pkg_config": str(done.pkg_config),
                "cpu_kernels": None if done.cpu_kernels is None else str(done.cpu_kernels),
                "no_cpu_kernels": done.no_cpu_kernels or None,
                "onnxruntime": None if runtime is None else str(runtime),
            }
        )
        return
    paths = (done.static, done.cpu_kernels, done.header, done.pkg_config)
    others = ", ".join(path.name for path in paths if path is not None)
    say(stdout(), f"{done.shared}: {size(bytes_)}, and {others}")
    if done.no_cpu_kernels:
        say(stdout(), f"Own kernels for the CPU aren't installed (docs/cpu-kernels.md): {done.no_cpu_kernels}")
    if runtime is not None:
        say(stdout(), f"ONNX Runtime's library, which bundles for cpu and cuda run with: {runtime}")


def _onnxruntime_library() -> Path | None:
    """The one that this Python's onnxruntime brings; None: it isn't installed."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        return None
    return next(iter(sorted((Path(found.origin).parent / "capi").glob("libonnxruntime.so.*"))), None)
