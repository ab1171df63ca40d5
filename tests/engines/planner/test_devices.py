"""The table of devices against their memory's width and rate, and NVIDIA's table of compute capabilities."""

from __future__ import annotations

import pytest

from qwen_aot.engines.planner.devices import DEVICES, find_device
from qwen_aot.engines.spec.targets import Target
from qwen_aot.errors import BuildError

# GiB, bits of the memory bus, transfers a second of one bit, compute capability.
PUBLISHED = {
    "orin-nano-8gb": (8, 128, 6.4e9, (8, 7)),
    "orin-nx-16gb": (16, 128, 6.4e9, (8, 7)),
    "agx-orin-64gb": (64, 256, 6.4e9, (8, 7)),
    "agx-thor-128gb": (128, 256, 8.533e9, (11, 0)),
    "rtx-4060": (8, 128, 17e9, (8, 9)),
    "rtx-4090": (24, 384, 21e9, (8, 9)),
    "rtx-5090": (32, 512, 28e9, (12, 0)),
    "l4": (24, 192, 12.5e9, (8, 9)),
}


def test_every_device_is_published() -> None:
    assert set(DEVICES) == set(PUBLISHED)


@pytest.mark.parametrize("key", PUBLISHED)
def test_memory_bandwidth_and_capability(key: str) -> None:
    gib, bits, rate, capability = PUBLISHED[key]
    device = DEVICES[key]
    assert device.memory_bytes == gib * 2**30
    assert device.bytes_per_second == pytest.approx(bits / 8 * rate, rel=0.005)
    assert device.capability == capability


# SMs, Hz, fp16 multiply-adds of one SM's tensor cores in a cycle (half of Ampere's on GeForce cards with fp32 sums).
COMPUTE = {
    "orin-nano-8gb": (8, 1.02e9, 1024),
    "agx-orin-64gb": (16, 1.3e9, 1024),
    "rtx-4090": (128, 2.52e9, 256),
    "l4": (58, 2.04e9, 512),
}


def test_tensor_throughput_is_that_of_the_sms() -> None:
    assert {key for key, device in DEVICES.items() if device.compute is not None} == set(COMPUTE)
    for key, (sm_count, clock, products) in COMPUTE.items():
        compute = DEVICES[key].compute
        assert compute is not None
        assert (compute.sm_count, compute.clock_hz) == (sm_count, clock)
        assert compute.tensor_flops == pytest.approx(2 * products * sm_count * clock, rel=0.005)


@pytest.mark.parametrize("key", DEVICES)
def test_what_is_reserved_is_a_small_part(key: str) -> None:
    device = DEVICES[key]
    assert device.usable_bytes == device.memory_bytes - device.reserved_bytes
    assert 2**29 <= device.reserved_bytes <= device.memory_bytes / 4


def test_rtx_engines_run_on_the_capabilities_that_it_lists() -> None:
    """8.6, 8.9 and 12.0 are what TensorRT-RTX's support matrix has of Ampere and later."""
    rtx = {key for key, device in DEVICES.items() if Target.TENSORRT_RTX in device.targets}
    assert rtx == {key for key, (*_, capability) in PUBLISHED.items() if capability in ((8, 6), (8, 9), (12, 0))}


def test_only_memory_that_the_cpu_shares_takes_the_cpu_target() -> None:
    assert {key for key, device in DEVICES.items() if Target.CPU in device.targets} == {
        key for key in PUBLISHED if "orin" in key or "thor" in key
    }


@pytest.mark.parametrize("name", ["rtx-4090", "RTX 4090", " rtx_4090 "])
def test_a_device_is_found_in_any_spelling(name: str) -> None:
    assert find_device(name) == "rtx-4090"


def test_an_unknown_device_is_refused_with_those_there_are() -> None:
    with pytest.raises(BuildError, match=r"device 'rtx-4091' isn't known; accepted: orin-nano-8gb, .*, l4$"):
        find_device("rtx-4091")
