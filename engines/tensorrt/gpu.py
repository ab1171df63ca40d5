"""The GPU of this machine, asked of its driver: a build for it needs no other library of CUDA."""

from __future__ import annotations

import ctypes

_DRIVER = "libcuda.so.1"
# CUdevice_attribute of the driver API.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


def own_capabilities() -> tuple[str, ...]:
    """The compute capability of the GPU that CUDA uses (CUDA_VISIBLE_DEVICES chooses): "8.9"; empty without one."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return ()
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    has_failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    if has_failed:
        return ()
    return (f"{major.value}.{minor.value}",)
