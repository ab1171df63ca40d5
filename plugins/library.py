"""Builds the plugins' library, with no GPU and no CUDA toolkit: `python -m qwen_aot.plugins.library -o FOLDER`.

FOLDER then holds `libqwen_aot_plugins.so`, and a folder `build` with what it was made of, so that the next build does
only what changed: `kernels` (plugins/aot.py), `table` (plugins/kernel_table.py), `headers` and `cmake`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.extras import install_command
from qwen_aot.machine import usable_cores
from qwen_aot.plugins import aot, kernel_table
from qwen_aot.plugins.variants import SMS
from qwen_aot.whole_file import file_sha256

FILE_NAME = "libqwen_aot_plugins.so"
SOURCES = Path(__file__).parent / "src"

# TensorRT's headers (10.14.1, Apache-2.0) where no SDK is installed: this package carries them.
HEADERS_PACKAGE = "kernel-lens==2.0.1"
HEADERS_SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
_NOT_FOR_CMAKE = {*'#;"\n'}  # in a path: the makefiles that it writes don't quote them
_BUILD_NAMES = {"kernels", "table", "headers", "cmake", "lock"}  # of what a build leaves in its folder
OLDEST_HEADERS = 10  # major version: the first with IPluginV3
_HEADERS_IN_WHEEL = "kernel_lens/include/tensorrt/"
_SDK_FOLDERS = (
    "/usr/include/x86_64-linux-gnu",  # Debian packages
    "/usr/include/aarch64-linux-gnu",  # JetPack
    "/usr/local/tensorrt/include",  # NVIDIA's containers
    "/usr/include",
)


def cuda_headers() -> Path:
    """The folder of cuda.h in triton's package, which also compiles the kernels."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def _run(command: Sequence[str | Path], failure: str) -> None:
    """Runs a command, and raises BuildError with its output if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"{failure}:\n{done.stdout.strip()}")


def _download_headers(folder: Path) -> None:
    """Takes TensorRT's headers, and nothing else, out of the package that carries them."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        _run(
            [*pip, "--only-binary", ":all:", "--dest", download, HEADERS_PACKAGE],
            "no TensorRT headers: no SDK was found, and its headers can't be downloaded; name a folder that has"
            " NvInferRuntime.h with --tensorrt-include",
        )
        (wheel,) = Path(download).glob("*.whl")
        found = file_sha256(wheel)
        if found != HEADERS_SHA256:
            raise BuildError(f"{wheel.name} has SHA-256 {found}, not {HEADERS_SHA256}; its headers aren't used")
        part = Path(download) / "headers"
        part.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(_HEADERS_IN_WHEEL) and name.endswith(".h"):
                    (part / Path(name).name).write_bytes(archive.read(name))
        part.rename(folder)


def _major_version(headers: Path) -> int:
    """Of the TensorRT whose headers these are; the oldest that will do, where they don't say."""
    path = headers / "NvInferVersion.h"
    text = path.read_text(errors="replace") if path.exists() else ""
    found = re.search(r"#define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", text)
    return int(found[1]) if found else OLDEST_HEADERS


def tensorrt_headers(build: Path, given: Path | None = None) -> Path:
    """The folder of NvInferRuntime.h: the given one, an SDK's that isn't too old, or a download into `build`/headers.

    Raises:
        BuildError: If the given folder has no headers or too old ones, or the download fails.
    """
    if given is not None:
        if not (given / "NvInferRuntime.h").exists():
            raise BuildError(f"{given} has no NvInferRuntime.h; give the include folder of a TensorRT SDK")
        if (major := _major_version(given)) < OLDEST_HEADERS:
            raise BuildError(
                f"{given} has the headers of TensorRT {major}; accepted: {OLDEST_HEADERS} or later. Leave"
                " --tensorrt-include out to have them downloaded"
            )
        return given.resolve()
    for folder in map(Path, _SDK_FOLDERS):
        if (folder / "NvInferRuntime.h").exists() and _major_version(folder) >= OLDEST_HEADERS:
            return folder
    downloaded = build.resolve() / "headers"
    if not downloaded.exists():
        downloaded.parent.mkdir(parents=True, exist_ok=True)
        _download_headers(downloaded)
    return downloaded


def find_cmake() -> str:
    """The path of cmake, once there is a compiler for it to use.

    Raises:
        BuildError: If one of the two is missing.
    """
    # pip puts it beside this Python, which needn't be on PATH
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None:
        raise BuildError(f"no cmake; install it with `{install_command('plugins')}`, or your system's package")
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
        raise BuildError("no C++ compiler; install one (Debian: apt install g++), or name it in CXX")
    return cmake


def _compile(cmake: str, build: Path, headers: Path, jobs: int | None) -> Path:
    """Configures and builds with CMake, and returns the library."""
    target = build / "cmake"
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "KERNEL_TABLE_DIR": build / "table",
        "KERNEL_CODE_DIR": build / "kernels",
        "TENSORRT_INCLUDE_DIR": headers,
        "CUDA_INCLUDE_DIR": cuda_headers(),
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    compiler, used = os.environ.get("CXX", ""), target / "CXX"
    if not used.exists() or used.read_text() != compiler:
        shutil.rmtree(target, ignore_errors=True)  # CMake keeps to the compiler that it found first
    _run([cmake, "-S", SOURCES, "-B", target, *options], "configuring the library failed")
    used.write_text(compiler)
    parallel = str(jobs or usable_cores())
    _run([cmake, "--build", target, "--parallel", parallel], "compiling the library failed")
    return target / FILE_NAME


def build_library(
    folder: Path,
    sms: Sequence[str] = SMS,
    *,
    only: str = "*",
    jobs: int | None = None,
    tensorrt_include: Path | None = None,
) -> Path:
    """Compiles the kernels for some SMs and the library around them.

    Args:
        folder: Where to write. What an earlier build left in it is used again where it is still right.
        sms: Of `plugins.variants.SMS`, each once. With 8.0 the library also holds PTX for later GPUs.
        only: A pattern of variant names ("gqa_*-fp16-*"). The library then serves these alone.
        jobs: Processes; the number of CPU cores by default.
        tensorrt_include: Folder of TensorRT's headers; see `tensorrt_headers` for the default.

    Returns:
        The path of libqwen_aot_plugins.so.

    Raises:
        BuildError: If something to build with is missing, or a step fails.
    """
    kernel_table.check_sms(sms)
    cmake = find_cmake()
    build = folder.resolve() / "build"
    if unusable := sorted({*str(build)} & _NOT_FOR_CMAKE):
        raise BuildError(f"CMake can't build in {build}, whose name has {' '.join(unusable)}; choose another folder")
    build.mkdir(parents=True, exist_ok=True)
    if strangers := sorted({path.name for path in build.iterdir()} - _BUILD_NAMES):
        found = ", ".join(strangers[:5])
        raise BuildError(f"{build} holds files that no build of the plugins writes ({found}); choose another folder")
    with _locked(build):
        headers = tensorrt_headers(build, tensorrt_include)
        aot.build(sms, build / "kernels", only=only, jobs=jobs)
        kernel_table.write(build / "kernels", sms, build / "table")
        return _install(_compile(cmake, build, headers, jobs), folder / FILE_NAME)


@contextlib.contextmanager
def _locked(build: Path) -> Iterator[None]:
    """While entered, no other process builds there; the lock ends with its process, however that ends."""
    with (build / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"another process builds in {build}; wait for it, or choose another folder") from error
        yield


def _install(built: Path, library: Path) -> Path:
    """Puts the library where it was asked for, whole or not at all."""
    part = library.with_suffix(".part")
    try:
        shutil.copyfile(built, part)  # aside, because a process may have the standing one mapped
        part.chmod(0o755)
        part.replace(library)
    finally:
        part.unlink(missing_ok=True)
    return library


def _job_count(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


def main() -> int:
    """The command line. Exit codes: 0 ok, 1 failed, 2 usage, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_aot.plugins.library",
        description="Build the plugins' library for TensorRT, with no GPU.",
        epilog="Examples:\n  python -m qwen_aot.plugins.library -o build/plugins\n"
        "  python -m qwen_aot.plugins.library --sm 8.9 -o build/plugins",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--sm", action="append", choices=SMS, help="an SM, may be given again (default: all)")
    parser.add_argument("--jobs", type=_job_count, help="processes, at least 1 (default: the CPU cores)")
    parser.add_argument(
        "--tensorrt-include", type=Path, help="folder of NvInferRuntime.h (default: an installed SDK's, or a download)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        library = build_library(
            arguments.output, arguments.sm or SMS, jobs=arguments.jobs, tensorrt_include=arguments.tensorrt_include
        )
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or arguments.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    size, digest = library.stat().st_size, file_sha256(library)
    facts = {"library": str(library), "bytes": size, "sha256": digest, "build_seconds": seconds}
    if arguments.json:
        print(json.dumps(facts))
    else:
        print(f"{library}: {size / 1e6:.1f} MB, SHA-256 {digest}, built in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
