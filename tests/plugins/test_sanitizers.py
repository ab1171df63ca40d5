"""The plugins' library and its C++ tests under GCC's sanitizers of addresses, undefined behavior and threads.

.ci/deep runs these. Each sanitizer is first seen to notice a fault.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from qwen_aot.plugins.library import cuda_headers, tensorrt_headers
from tests.plugins.builds import (
    CPP_TESTS,
    SELECTION_SOURCES,
    THREADS_SOURCES,
    build_variant,
    compile_cpp_test,
    cpp_test_names,
)
from tests.plugins.conftest import IS_INTERPRETED
from tests.plugins.driver.execution import Gpu
from tests.plugins.enqueue import Enqueue, Fault, Paths, compile_driver
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.moe_cases import MoeStep
from tests.shared import once
from tests.tools import require_tool

if not IS_INTERPRETED:
    pytest.skip("launches are executed in Triton's interpreter only", allow_module_level=True)

pytestmark = pytest.mark.deep

THREADS = ("-fsanitize=thread", "-g")
# vptr: what a library that hides its symbols has of a class's type is another thing than what its caller has.
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
)
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
# Python and its packages aren't instrumented, and keep what they allocate to the end.
IN_PYTHON = {"ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


@pytest.fixture(scope="module")
def compiler() -> str:
    return require_tool("g++", remedy="apt install g++")


@pytest.fixture(scope="module")
def library(plugin_build: Path, shared_folder: Path, compiler: str) -> Path:
    """The plugins' library, instrumented."""

    def make(folder: Path) -> Path:
        return build_variant(plugin_build, folder, compiler=compiler, flags=" ".join(SANITIZERS))

    return once(shared_folder / "sanitized", make)


def run(command: list[str | Path], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280)


FAULTS = {
    "address": ("int* p = new int[2]; int x = p[argc + 1]; delete[] p; return x;", "heap-buffer-overflow"),
    "leak": ("static_cast<void>(argc); return new int[argc] == nullptr;", "LeakSanitizer"),
    "undefined": ("int x = 2147483647; x += argc; return x == 3;", "signed integer overflow"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, tmp_path: Path, compiler: str) -> None:
    """What these tests would look like if there were something to find."""
    body, said = FAULTS[name]
    source = tmp_path / "fault.cpp"
    source.write_text(f"int main(int argc, char**) {{ {body} }}\n")
    subprocess.run([compiler, *SANITIZERS, "-o", tmp_path / "fault", source], check=True)
    done = run([tmp_path / "fault"], ENVIRONMENT)
    assert done.returncode != 0 and said in done.stderr


def test_a_race_is_noticed(tmp_path: Path, compiler: str) -> None:
    source = tmp_path / "race.cpp"
    source.write_text(
        "#include <thread>\nint n = 0;\n"
        "int main() { std::thread a([] { ++n; }); std::thread b([] { ++n; }); a.join(); b.join(); }\n"
    )
    subprocess.run([compiler, *THREADS, "-o", tmp_path / "race", source], check=True)
    done = run([tmp_path / "race"], {})
    assert done.returncode != 0 and "ThreadSanitizer: data race" in done.stderr


@pytest.fixture(scope="module")
def thread_tests(plugin_build: Path, shared_folder: Path, compiler: str) -> tuple[Path, Path]:
    """The program, and its driver."""

    def make(folder: Path) -> tuple[Path, Path]:
        driver = folder / "libcuda.so.1"
        shared = ("-shared", "-fPIC", f"-Wl,-soname,{driver.name}", *THREADS)
        compile_cpp_test(plugin_build, driver, CPP_TESTS / "threads_driver.cpp", *shared, compiler=compiler)
        return compile_cpp_test(plugin_build, folder / "test", *THREADS_SOURCES, *THREADS, compiler=compiler), driver

    return once(shared_folder / "thread_tests", make)


@pytest.mark.parametrize("name", cpp_test_names("test_threads.cpp"))
def test_threads(thread_tests: tuple[Path, Path], name: str) -> None:
    program, driver = thread_tests
    done = run([program, driver, name], {"LD_LIBRARY_PATH": str(driver.parent)})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def interface_tests(plugin_build: Path, shared_folder: Path, compiler: str) -> Path:
    def make(folder: Path) -> Path:
        arguments = (CPP_TESTS / "test_plugins.cpp", *SANITIZERS)
        return compile_cpp_test(plugin_build, folder / "test", *arguments, compiler=compiler)

    return once(shared_folder / "sanitized_interface_tests", make)


@pytest.mark.parametrize("name", cpp_test_names("test_plugins.cpp"))
def test_interface(interface_tests: Path, library: Path, name: str) -> None:
    done = run([interface_tests, library, name], ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def selection_tests(plugin_build: Path, shared_folder: Path, compiler: str) -> Path:
    def make(folder: Path) -> Path:
        return compile_cpp_test(plugin_build, folder / "test", *SELECTION_SOURCES, *SANITIZERS, compiler=compiler)

    return once(shared_folder / "sanitized_selection_tests", make)


@pytest.mark.parametrize("name", cpp_test_names("test_selection.cpp"))
def test_selection(selection_tests: Path, name: str) -> None:
    done = run([selection_tests, name], ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_of_it_is_instrumented(
    library: Path, interface_tests: Path, selection_tests: Path, thread_tests: tuple[Path, Path]
) -> None:
    """Else every test here would pass, and none would look at anything."""
    for file in (library, interface_tests, selection_tests):
        assert {b"__asan_init", b"__ubsan_handle_"} <= marks_of(file), file
    for file in thread_tests:
        assert b"__tsan_init" in marks_of(file), file


def marks_of(file: Path) -> set[bytes]:
    return set(re.findall(rb"__asan_init|__ubsan_handle_|__tsan_init", file.read_bytes()))


STEPS = {
    "decode": GqaStep(lengths=[(300, 1), (0, 1), (5, 0)], steps=1, group=5),
    "prefill": GqaStep(lengths=[(47, 9), (1, 8)], steps=9, is_int8=True),
    "few": MoeStep(num_tokens=3, form="4z"),
    "many": MoeStep(num_tokens=20, form="8"),
}
ENQUEUE = """
import pickle, sys
from tests.plugins import interpreter
from tests.plugins.enqueue import run
interpreter.install()
paths, request = pickle.load(open(sys.argv[1], "rb"))
print(len(pickle.loads(run(paths, request))), "ran")
"""


def in_python(compiler: str, code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Code in a Python that has the sanitizers' libraries preloaded."""
    preload = [run([compiler, f"-print-file-name={file}"], {}).stdout.strip() for file in ("libasan.so", "libubsan.so")]
    return run([sys.executable, "-c", code, *arguments], {**IN_PYTHON, "LD_PRELOAD": " ".join(preload)})


@pytest.mark.parametrize("name", ["address", "undefined"])
def test_a_fault_is_noticed_in_python(name: str, tmp_path: Path, compiler: str) -> None:
    """Leaks aren't: Python's own would be."""
    body, said = FAULTS[name]
    (tmp_path / "fault.cpp").write_text(f'extern "C" int fault(int argc) {{ {body} }}\n')
    library = tmp_path / "libfault.so"
    subprocess.run([compiler, *SANITIZERS, "-shared", "-fPIC", "-o", library, tmp_path / "fault.cpp"], check=True)
    done = in_python(compiler, "import ctypes, sys; ctypes.CDLL(sys.argv[1]).fault(int(sys.argv[2]))", library, "1")
    assert done.returncode != 0 and said in done.stderr


@pytest.mark.parametrize("name", STEPS)
def test_enqueue(name: str, library: Path, plugin_build: Path, tmp_path: Path, compiler: str) -> None:
    """Steps, of which a driver call fails or none."""
    headers = [tensorrt_headers(plugin_build / "build"), cuda_headers()]
    paths = Paths(*compile_driver(tmp_path, headers), library, plugin_build / "build" / "kernels")
    functions = ("cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel")
    enqueues = [Enqueue(STEPS[name], fault=Fault(function)) for function in functions] + [Enqueue(STEPS[name])] * 2
    request = tmp_path / "request"
    request.write_bytes(pickle.dumps((paths, pickle.dumps((enqueues, [Gpu()], "runtime")))))
    done = in_python(compiler, ENQUEUE, request)
    assert done.returncode == 0 and f"{len(enqueues)} ran" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
