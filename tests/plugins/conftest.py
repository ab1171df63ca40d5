"""Kernels run interpreted on the CPU, or on a GPU where TRITON_INTERPRET=0 was set (tests/plugins/test_gpu.py does)."""

import concurrent.futures
import fcntl
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen_aot.plugins.library import FILE_NAME, build_library, cuda_headers, tensorrt_headers
from tests.plugins.ptx.interpreter import compile_interpreter
from tests.shared import once

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if IS_INTERPRETED:
    from tests.plugins import interpreter

    interpreter.install()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def plugin_build(pytestconfig: pytest.Config) -> Path:
    """A folder in which the library was built for SM 8.9, kept for the next session, which builds only what changed."""
    folder = Path(pytestconfig.cache.mkdir("plugin_library"))
    with open(folder / "lock", "w") as lock:  # pytest-xdist has several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_library(folder, ["8.9"])
    return folder


@pytest.fixture(scope="session")
def plugin_library(plugin_build: Path) -> Path:
    """The plugins' library, built for SM 8.9."""
    return plugin_build / FILE_NAME


def kept_library(config: pytest.Config, plugin_build: Path, name: str, sm: str, only: str = "*") -> Path:
    """A library for one SM in a folder of pytest's cache, of which the next session builds only what changed.

    Args:
        config: whose cache.
        plugin_build: the fixture's, which has TensorRT's headers.
        name: of the folder.
        sm: as in `plugins.variants.SMS`.
        only: a pattern of variant names.
    """
    folder = Path(config.cache.mkdir(name))
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_library(folder, [sm], only=only, tensorrt_include=tensorrt_headers(plugin_build / "build"))


@pytest.fixture(scope="session")
def sm80_library(pytestconfig: pytest.Config, plugin_build: Path) -> Path:
    """The plugins' library for SM 8.0, with PTX, of fp16 attention alone; its tiles take more than 48 KiB."""
    return kept_library(pytestconfig, plugin_build, "plugin_library_sm80", "8.0", "gqa_*-fp16-[sd]*")


@pytest.fixture(scope="session")
def driver_files(plugin_build: Path, shared_folder: Path) -> tuple[Path, Path]:
    """The double of the CUDA driver, and the harness that calls the library as TensorRT does."""
    from tests.plugins.enqueue import compile_driver

    headers = [tensorrt_headers(plugin_build / "build"), cuda_headers()]
    return once(shared_folder / "driver", lambda folder: compile_driver(folder, headers))


@pytest.fixture(scope="session")
def ptx_interpreter(shared_folder: Path) -> Path:
    """The interpreter of PTX, a library."""
    return once(shared_folder / "ptx_interpreter", compile_interpreter)


@pytest.fixture(scope="session")
def other_process() -> Iterator[concurrent.futures.Executor]:
    """A process where the double can be loaded: from then on, it is what libraries there take for the driver."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool
