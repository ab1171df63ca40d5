"""The plugins' library for aarch64 (Jetson, Grace), compiled here and run by qemu; .ci/deep runs these."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.plugins.builds import CPP_TESTS, SELECTION_SOURCES, build_variant, compile_cpp_test, cpp_test_names
from tests.shared import once
from tests.tools import require_tool

pytestmark = pytest.mark.deep

NEEDED = re.compile(r"\b(GLIBC|GLIBCXX|CXXABI)_(\d[\d.]*)")
SYSROOT = "/usr/aarch64-linux-gnu"  # Debian's libc6-dev-arm64-cross


@pytest.fixture(scope="module")
def compiler() -> str:
    return require_tool("aarch64-linux-gnu-g++", remedy="apt install g++-aarch64-linux-gnu")


@pytest.fixture(scope="module")
def emulator() -> list[str]:
    return [require_tool("qemu-aarch64", remedy="apt install qemu-user"), "-L", SYSROOT]


@pytest.fixture(scope="module")
def library(plugin_build: Path, shared_folder: Path, compiler: str) -> Path:
    """The plugins' library for aarch64, with the kernels that the one of this machine has."""
    return once(shared_folder / "aarch64", lambda folder: build_variant(plugin_build, folder, compiler=compiler))


def test_it_is_a_library_for_aarch64_with_the_same_kernels(library: Path, plugin_build: Path) -> None:
    header = subprocess.run(["readelf", "--file-header", library], check=True, capture_output=True, text=True).stdout
    assert "Machine:                           AArch64" in header
    data = library.read_bytes()
    cubins = list((plugin_build / "build" / "kernels" / "sm_89").glob("*.cubin"))
    assert cubins and all(cubin.read_bytes() in data for cubin in cubins)


# What Ubuntu 22.04 has, of which JetPack 6 is made.
JETPACK_6 = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}


def test_it_needs_no_newer_system_than_jetpack_6(library: Path) -> None:
    symbols = subprocess.run(
        ["readelf", "--version-info", "--wide", library], check=True, capture_output=True, text=True
    )
    needed = {(name, tuple(map(int, version.split(".")))) for name, version in NEEDED.findall(symbols.stdout)}
    assert {name for name, _ in needed} == set(JETPACK_6)
    assert [(name, version) for name, version in sorted(needed) if version > JETPACK_6[name]] == []


@pytest.fixture(scope="module")
def interface_tests(plugin_build: Path, shared_folder: Path, compiler: str) -> Path:
    def make(folder: Path) -> Path:
        return compile_cpp_test(plugin_build, folder / "test", CPP_TESTS / "test_plugins.cpp", compiler=compiler)

    return once(shared_folder / "aarch64_interface_tests", make)


@pytest.mark.parametrize("name", cpp_test_names("test_plugins.cpp"))
def test_interface(interface_tests: Path, library: Path, emulator: list[str], name: str) -> None:
    done = subprocess.run([*emulator, interface_tests, library, name], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def selection_tests(plugin_build: Path, shared_folder: Path, compiler: str) -> Path:
    def make(folder: Path) -> Path:
        return compile_cpp_test(plugin_build, folder / "test", *SELECTION_SOURCES, compiler=compiler)

    return once(shared_folder / "aarch64_selection_tests", make)


@pytest.mark.parametrize("name", cpp_test_names("test_selection.cpp"))
def test_selection(selection_tests: Path, emulator: list[str], name: str) -> None:
    done = subprocess.run([*emulator, selection_tests, name], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
