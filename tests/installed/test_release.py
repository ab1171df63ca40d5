"""What scripts/release.sh makes, each part in an empty place; .ci/deep runs these.

The plugins' libraries, whose kernels take minutes, are left out: tests/plugins compiles and runs both processors'.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from qwen_aot.runtime.capi.build import OLDEST_GLIBC, PROCESSORS, Installed
from qwen_aot.version import __version__
from tests.installed.environments import Archives
from tests.installed.environments import run as run_clean
from tests.installed.test_archives import contents
from tests.runtime.capi.client import HEADER, read_header
from tests.runtime.capi.native import SYSROOT, run
from tests.runtime.capi.test_install import EXAMPLES, MAX_BYTES, answer, compile_with_pkg_config
from tests.runtime.capi.test_symbols import foreign
from tests.shared import once
from tests.tools import require_package, require_tool

pytestmark = [pytest.mark.deep, pytest.mark.tools]

OF_GLIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
MACHINES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
WHEEL = f"qwen_aot-{__version__}-py3-none-any.whl"
SDIST = f"qwen_aot-{__version__}.tar.gz"


def release(checkout: Path, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the script of a copy of the checkout with this Python."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "RELEASE_PYTHON": sys.executable, **variables}
    command = ["sh", checkout / "scripts" / "release.sh", out]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(archives: Archives, shared_folder: Path) -> Path:
    """The folder of a release."""
    for package in ("ziglang", "wheel"):
        require_package(package, remedy="pip install 'qwen-aot[release]'")

    def make(folder: Path) -> Path:
        done = release(archives.checkout, folder / "dist", RELEASE_PARTS="python capi")
        assert done.returncode == 0, done.stderr
        return folder / "dist"

    return once(shared_folder / "release", make)


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def portable(processor: str, made: Path, shared_folder: Path) -> Installed:
    """The C library of a processor, unpacked in another place than where it was made."""
    name = f"libqwen_aot-{__version__}-linux-{processor}"

    def make(folder: Path) -> Path:
        with tarfile.open(made / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        return folder / name

    prefix = once(shared_folder / f"capi_{processor}", make)
    lib = prefix / "lib"
    return Installed(
        prefix,
        prefix / "include" / "qwen_aot.h",
        lib / "libqwen_aot.so",
        lib / "libqwen_aot.a",
        lib / "pkgconfig" / "qwen_aot.pc",
        lib / "libqwen_aot_cpu.so",
    )


def test_what_is_there(made: Path) -> None:
    archives = {f"libqwen_aot-{__version__}-linux-{processor}.tar.gz" for processor in PROCESSORS}
    wheels = {wheel_of(made, processor).name for processor in PROCESSORS}
    assert {path.name for path in made.iterdir()} == {WHEEL, SDIST, "SHA256SUMS", *archives, *wheels}


def wheel_of(made: Path, processor: str) -> Path:
    """The wheel with own CPU kernels, whose tag says which glibc it needs."""
    (wheel,) = made.glob(f"qwen_aot-{__version__}-py3-none-manylinux_2_*_{processor}.whl")
    return wheel


def test_wheels_with_own_kernels(made: Path, processor: str, tmp_path: Path) -> None:
    """The library is of the processor, and older systems have all that it needs."""
    place = "qwen_aot/plugins/cpu/lib/libqwen_aot_cpu.so"
    with zipfile.ZipFile(wheel_of(made, processor)) as own, zipfile.ZipFile(made / WHEEL) as pure:
        assert set(own.namelist()) - set(pure.namelist()) == {place}
        own.extract(place, tmp_path)
    assert MACHINES[processor] in run(["readelf", "--file-header", tmp_path / place])
    assert newest_glibc(tmp_path / place) <= tuple(map(int, OLDEST_GLIBC.split(".")))
    assert needed(tmp_path / place) <= OF_GLIBC


def test_own_kernels_beside_the_c_library(portable: Installed, processor: str) -> None:
    assert portable.cpu_kernels is not None
    assert MACHINES[processor] in run(["readelf", "--file-header", portable.cpu_kernels])
    assert newest_glibc(portable.cpu_kernels) <= tuple(map(int, OLDEST_GLIBC.split(".")))
    assert needed(portable.cpu_kernels) <= OF_GLIBC


def test_checksums(made: Path) -> None:
    listed = dict(reversed(line.split("  ")) for line in (made / "SHA256SUMS").read_text().splitlines())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made.iterdir()}
    assert listed == {name: digest for name, digest in files.items() if name != "SHA256SUMS"}


def test_python_packages(made: Path, archives: Archives, tmp_path: Path) -> None:
    """They are those that the other tests here install; the wheel goes into an empty folder as well."""
    assert contents(made / WHEEL) == contents(archives.wheel)
    with tarfile.open(made / SDIST) as one, tarfile.open(archives.sdist) as other:
        assert sorted(one.getnames()) == sorted(other.getnames())
    place = tmp_path / "place"
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--target", place)
    assert run_clean(*pip, made / WHEEL, cwd=tmp_path).returncode == 0
    code = f"import sys; sys.path.insert(0, {str(place)!r}); import qwen_aot; print(qwen_aot.__file__)"
    assert run_clean(sys.executable, "-c", code, cwd=tmp_path).stdout.startswith(str(place))


def test_a_folder_of_somebody_else_is_not_replaced(archives: Archives, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("")
    done = release(archives.checkout, tmp_path)
    assert done.returncode == 1 and "no release" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_unknown_part(archives: Archives, tmp_path: Path) -> None:
    done = release(archives.checkout, tmp_path / "out", RELEASE_PARTS="pyhton")
    assert done.returncode == 1 and "pyhton; accepted: python, capi, plugins" in done.stderr


def newest_glibc(file: Path) -> tuple[int, ...]:
    """The newest version of glibc's symbols that a file needs."""
    found = re.findall(r"Name: GLIBC_([\d.]+)", run(["readelf", "--version-info", "--wide", file]))
    return max(tuple(map(int, version.split("."))) for version in found)


def needed(file: Path) -> set[str]:
    """Libraries that a file needs."""
    return set(re.findall(r"\(NEEDED\).*\[(.*?)\]", run(["readelf", "--dynamic", file])))


def test_what_it_needs(portable: Installed, processor: str) -> None:
    assert MACHINES[processor] in run(["readelf", "--file-header", portable.shared])
    assert newest_glibc(portable.shared) <= tuple(map(int, OLDEST_GLIBC.split(".")))
    assert needed(portable.shared) <= OF_GLIBC
    assert "[libqwen_aot.so.1]" in run(["readelf", "--dynamic", portable.shared])


def test_what_needs_more_is_seen(tmp_path: Path) -> None:
    """Negative control: a library of this machine's compiler, whose dlopen is of glibc 2.34, and one of C++."""
    (tmp_path / "more.cpp").write_text(
        '#include <dlfcn.h>\n#include <string>\nextern "C" void* more(char const* n)'
        "{ return dlopen((std::string(n) + n).c_str(), 1); }\n"
    )
    run(["g++", "-shared", "-fPIC", tmp_path / "more.cpp", "-o", tmp_path / "libmore.so"])
    assert newest_glibc(tmp_path / "libmore.so") > tuple(map(int, OLDEST_GLIBC.split(".")))
    assert needed(tmp_path / "libmore.so") - OF_GLIBC >= {"libstdc++.so.6"}


def test_its_size(portable: Installed) -> None:
    assert portable.shared.stat().st_size <= MAX_BYTES
    assert ".symtab" not in run(["readelf", "--sections", portable.shared])  # it is stripped
    assert ".debug" not in run(["readelf", "--sections", "--wide", portable.static])


def test_it_exports_what_the_header_names(portable: Installed) -> None:
    functions, _ = read_header(HEADER.read_text(encoding="utf-8"))
    symbols = run(["readelf", "--dyn-syms", "--wide", portable.shared]).splitlines()
    found = {
        fields[7].partition("@")[0]
        for fields in map(str.split, symbols)
        if len(fields) >= 8 and fields[4] == "GLOBAL" and fields[6].isdigit()
    }
    assert found == {function.name for function in functions}


def test_programs_of_this_machines_compiler(
    portable: Installed, processor: str, text_bundle: Path, onnxruntime: Path, tmp_path: Path
) -> None:
    """The static library and the shared one, linked by g++; of the other processor qemu runs what needs no engine."""
    is_own = processor == "x86_64"
    compiler = "gcc" if is_own else require_tool("aarch64-linux-gnu-gcc", remedy="apt install g++-aarch64-linux-gnu")
    include, system = f"-I{portable.header.parent}", ["-ldl", "-lm", "-pthread"]
    static, shared = tmp_path / "static", tmp_path / "shared"
    run([compiler, EXAMPLES / "stream.c", include, portable.static, *system, "-o", static])
    run([compiler, EXAMPLES / "stream.c", include, f"-L{portable.shared.parent}", "-lqwen_aot", "-o", shared])
    if is_own:
        compile_with_pkg_config(EXAMPLES / "stream.c", tmp_path, portable)
        assert answer([tmp_path / "stream", text_bundle, "Hello"], portable, onnxruntime)
        assert foreign(portable.static) == set()
        assert answer([static, text_bundle, "Hello"], portable, onnxruntime)
        assert answer([shared, text_bundle, "Hello"], portable, onnxruntime)
        return
    qemu = [require_tool("qemu-aarch64", remedy="apt install qemu-user"), "-L", SYSROOT]
    paths = ["-E", f"LD_LIBRARY_PATH={portable.shared.parent}:{SYSROOT}/lib"]
    for command in ([*qemu, static], [*qemu, *paths, shared]):
        done = subprocess.run([*command, tmp_path / "nowhere", "x"], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "nowhere" in done.stderr, done
