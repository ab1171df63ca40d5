"""The GPU's compute capability, from a stand-in for the driver's library."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from qwen_aot.engines.tensorrt.gpu import own_capabilities


class Driver:
    """libcuda with one GPU; every call writes through the pointer that it is given, as C does."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails

    def cuInit(self, flags: int) -> int:  # noqa: N802  the driver's name
        assert flags == 0
        return 100 if self._fails == "cuInit" else 0  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        assert ordinal == 0
        device._obj.value = 7
        return 101 if self._fails == "cuDeviceGet" else 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        assert device.value == 7
        value._obj.value = {75: 12, 76: 1}[attribute]
        return 0


def test_the_gpus_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert own_capabilities() == ("12.1",)


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGet"])
def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(call))
    assert own_capabilities() == ()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_aot.engines.tensorrt.gpu._DRIVER", "libnothing.so.1")
    assert own_capabilities() == ()
