"""The double refuses what the driver refuses: each misuse once, and a correct launch beside it."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_aot.plugins import aot

SHARED_BYTES = 99 * 1024
SUCCESS, INVALID_VALUE, INVALID_IMAGE, INVALID_CONTEXT = 0, 1, 200, 201
NO_BINARY, INVALID_HANDLE, NOT_FOUND, NOT_PERMITTED = 209, 400, 500, 800
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 900, 901
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """`moe_count` as cubins and PTX: five parameters, of which the third is an integer; 128 threads."""
    folder = tmp_path_factory.mktemp("images")
    aot.build(["8.0", "8.9"], folder, only="moe_count", jobs=1)
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/moe_count.[cp]*")}


class Session:
    """A context of SM 8.9 and, in it, a stream and the function; lives in the other process."""

    def __init__(self, driver: Path, images: dict[str, bytes]) -> None:
        self.driver, self.images = ctypes.CDLL(str(driver)), images
        for name in ("double_create_context", "double_create_stream"):
            getattr(self.driver, name).restype = ctypes.c_void_p
        for name in ("double_take_calls", "double_take_misuses"):
            getattr(self.driver, name).restype = ctypes.c_char_p
        self.driver.double_set_callback(None)
        self.driver.double_end_capture()  # that an earlier session began
        self.take()
        self.context = ctypes.c_void_p(self.driver.double_create_context(8, 9, 4, SHARED_BYTES))
        self.stream = ctypes.c_void_p(self.driver.double_create_stream())
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        assert self.load("sm_89") == self.get("moe_count") == SUCCESS

    def take(self) -> str:
        self.driver.double_take_calls()
        return self.driver.double_take_misuses().decode().strip()

    def load(self, name: str) -> int:
        return self.driver.cuModuleLoadData(ctypes.byref(self.module), self.images[name])

    def get(self, name: str) -> int:
        return self.driver.cuModuleGetFunction(ctypes.byref(self.function), self.module, name.encode())

    def allow(self, shared_bytes: int) -> int:
        return self.driver.cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)

    def launch(self, *, grid=(1, 1, 1), block=(128, 1, 1), shared=0, parameters=5, stream=None, extra=None) -> int:
        values = (ctypes.c_uint64 * 5)()
        pointers = (ctypes.c_void_p * 5)(*(ctypes.addressof(values) + 8 * index for index in range(parameters)))
        stream = self.stream if stream is None else stream
        return self.driver.cuLaunchKernel(self.function, *grid, *block, shared, stream, pointers, extra)

    def switch_to(self, major: int, minor: int) -> int:
        """Another GPU, and a context there."""
        self.driver.double_create_context(major, minor, 4, SHARED_BYTES)
        return SUCCESS

    def switch_back(self) -> int:
        self.driver.double_set_current(self.context)
        return SUCCESS

    def capture(self) -> int:
        self.driver.double_begin_capture(self.stream)
        return SUCCESS

    def end_capture(self) -> int:
        return self.driver.double_end_capture()

    def exchange(self, mode: ctypes.c_int) -> int:
        return self.driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def load_relaxed(self) -> int:
        """As `load` and `get`, in a mode that allows it while a stream is captured."""
        mode = ctypes.c_int(RELAXED)
        return self.exchange(mode) or self.load("sm_89") or self.get("moe_count") or self.exchange(mode)

    def push(self) -> int:
        return self.driver.cuCtxPushCurrent_v2(self.context)

    def pop(self) -> int:
        return self.driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


CORRECT: dict[str, Callable[[Session], int]] = {
    "launch": lambda on: on.launch(shared=48 * 1024, grid=(2**31 - 1, 65535, 65535)),
    "more shared memory, allowed": lambda on: on.allow(SHARED_BYTES) or on.launch(shared=SHARED_BYTES),
    "cubin of an earlier SM of the generation": lambda on: on.load("sm_80"),
    "PTX": lambda on: on.load("ptx") or on.get("moe_count") or on.launch(),
    "of this context again": lambda on: on.switch_to(8, 9) or on.switch_back() or on.launch(),
    "pushed and popped": lambda on: on.switch_to(8, 9) or on.push() or on.launch() or on.pop(),
}
MISUSED: dict[str, tuple[Callable[[Session], int], int, str]] = {
    "function": (lambda on: on.get("moe_sum"), NOT_FOUND, "a module has no function moe_sum"),
    "image": (
        lambda on: on.driver.cuModuleLoadData(ctypes.byref(on.module), b"no image"),
        INVALID_IMAGE,
        "a module's image is neither a cubin nor PTX",
    ),
    "SM": (
        lambda on: on.switch_to(8, 6) or on.load("sm_89"),
        NO_BINARY,
        "cubin of SM 89 is loaded on SM 86",
    ),
    "SM of Tegra": (
        lambda on: on.switch_to(8, 7) or on.load("sm_80"),
        NO_BINARY,
        "cubin of SM 80 is loaded on SM 87",
    ),
    "PTX of a later SM": (
        lambda on: on.switch_to(7, 5) or on.load("ptx"),
        NO_BINARY,
        "PTX of SM 80 is loaded on SM 75",
    ),
    "grid of none": (
        lambda on: on.launch(grid=(1, 0, 1)),
        INVALID_VALUE,
        "launch of moe_count: grid of 0 on axis 1",
    ),
    "grid too large": (
        lambda on: on.launch(grid=(1, 1, 65536)),
        INVALID_VALUE,
        "launch of moe_count: grid of 65536 on axis 2",
    ),
    "block": (
        lambda on: on.launch(block=(64, 1, 1)),
        INVALID_VALUE,
        "launch of moe_count: block of 64 x 1 x 1 threads",
    ),
    "shared memory": (
        lambda on: on.launch(shared=48 * 1024 + 1),
        INVALID_VALUE,
        "launch of moe_count: 49153 bytes of shared memory, of which 49152 are allowed",
    ),
    "shared memory that no block has": (
        lambda on: on.allow(SHARED_BYTES + 1),
        INVALID_VALUE,
        f"moe_count is allowed {SHARED_BYTES + 1} bytes of shared memory; the GPU has {SHARED_BYTES}",
    ),
    "parameter": (
        lambda on: on.launch(parameters=4),
        INVALID_VALUE,
        "launch of moe_count: a parameter is missing",
    ),
    "context of the module": (
        lambda on: on.switch_to(8, 9) or on.launch(),
        INVALID_CONTEXT,
        "launch of moe_count: its module isn't of the current context",
    ),
    "context after popping": (
        lambda on: on.switch_to(8, 9) or on.push() or on.pop() or on.launch(),
        INVALID_CONTEXT,
        "launch of moe_count: its module isn't of the current context",
    ),
    "nothing to pop": (lambda on: on.pop(), INVALID_CONTEXT, "a context is popped that wasn't pushed"),
    "default stream": (
        lambda on: on.launch(stream=ctypes.c_void_p()),
        INVALID_HANDLE,
        "launch of moe_count: the stream isn't of the current context",
    ),
    "after unloading": (
        lambda on: on.driver.cuModuleUnload(on.module) or on.launch(),
        INVALID_HANDLE,
        "a launch of no function",
    ),
    "loading while a stream is captured": (
        lambda on: on.capture() or on.load("sm_89"),
        CAPTURE_UNSUPPORTED,
        "cuModuleLoadData while a stream is captured",
    ),
    "finding a function while a stream is captured": (
        lambda on: on.capture() or on.get("moe_count"),
        CAPTURE_UNSUPPORTED,
        "cuModuleGetFunction while a stream is captured",
    ),
    "unloading while a stream is captured": (
        lambda on: on.capture() or on.driver.cuModuleUnload(on.module),
        CAPTURE_UNSUPPORTED,
        "cuModuleUnload while a stream is captured",
    ),
    "a launch in a capture that has failed": (
        lambda on: on.capture() or (on.load("sm_89"), on.launch())[1],
        CAPTURE_INVALIDATED,
        "cuModuleLoadData while a stream is captured",
    ),
    "allocation while a stream is captured": (
        lambda on: on.capture() or on.driver.cuMemAllocAsync(None, 16, on.stream),
        NOT_PERMITTED,
        "cuMemAllocAsync is nothing that a plugin may call, and a stream is captured",
    ),
    "allocation": (
        lambda on: on.driver.cuMemAllocAsync(None, 16, on.stream),
        NOT_PERMITTED,
        "cuMemAllocAsync is nothing that a plugin may call",
    ),
    "synchronisation": (
        lambda on: on.driver.cuStreamSynchronize(on.stream),
        NOT_PERMITTED,
        "cuStreamSynchronize is nothing that a plugin may call",
    ),
}


def attempt(driver: Path, images: dict[str, bytes], name: str) -> tuple[int, str]:
    session = Session(driver, images)
    action = CORRECT[name] if name in CORRECT else MISUSED[name][0]
    return action(session), session.take()


def fail_second_load(driver: Path, images: dict[str, bytes]) -> tuple[list[int], list[str]]:
    session = Session(driver, images)
    session.driver.double_take_calls()
    session.driver.double_fail(b"cuModuleLoadData", 2, 2)
    results = [session.load("sm_89"), session.load("sm_89"), session.load("sm_89")]
    return results, session.driver.double_take_calls().decode().split()


@pytest.mark.parametrize("name", CORRECT)
def test_correct(name, images, driver_files, other_process):
    assert other_process.submit(attempt, driver_files[0], images, name).result() == (SUCCESS, "")


@pytest.mark.parametrize("name", MISUSED)
def test_misuse_is_refused_and_recorded(name, images, driver_files, other_process):
    _, result, message = MISUSED[name]
    assert other_process.submit(attempt, driver_files[0], images, name).result() == (result, message)


def test_nth_call_fails_and_the_next_does_not(images, driver_files, other_process):
    results, calls = other_process.submit(fail_second_load, driver_files[0], images).result()
    assert results == [SUCCESS, 2, SUCCESS] and calls == ["cuModuleLoadData"] * 3
