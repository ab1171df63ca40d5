"""Devices that a plan can be made for, as data.

Bandwidth is what the data sheet promises, bus width times transfer rate. What the system keeps of the memory is an
assumption, stated once for each kind of device. Compute capabilities: NVIDIA's table, developer.nvidia.com/cuda-gpus.
What a GPU computes is listed for the devices that docs/plugins-performance.md models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engines.spec import Target
from qwen_aot_errors import BuildError

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Compute:
    """What a GPU computes.

    Attributes:
        sm_count: streaming multiprocessors.
        clock_hz: the clock that `tensor_flops` is stated at.
        tensor_flops: dense fp16 products with fp32 sums on tensor cores, two operations a multiply-add, a second.
        l2_bytes: of the cache that all SMs share.
    """

    sm_count: int
    clock_hz: float
    tensor_flops: float
    l2_bytes: int


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    Attributes:
        name: as its maker calls it.
        capability: its GPU's compute capability (SM).
        memory_bytes: that the GPU can address: its own, or what it shares with the CPU.
        bytes_per_second: the bandwidth of that memory.
        reserved_bytes: assumed to be taken before an engine gets any.
        targets: that run in this memory; the first is the default.
        compute: None: not looked up, nothing here needs it.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    bytes_per_second: float
    reserved_bytes: int
    targets: tuple[Target, ...]
    compute: Compute | None = None

    @property
    def capability_name(self) -> str:
        """The compute capability as NVIDIA writes it: 8.7."""
        return ".".join(map(str, self.capability))

    @property
    def usable_bytes(self) -> int:
        """What is left for an engine."""
        return self.memory_bytes - self.reserved_bytes


def _jetson(
    name: str, capability: tuple[int, int], gib: int, bytes_per_second: float, compute: Compute | None = None
) -> Device:
    """A Jetson module: CPU and GPU share the memory.

    Assumed reserve: a sixteenth for the carve-outs that Linux doesn't see (an AGX Orin 64 GB shows 62,841 of
    65,536 MiB in tegrastats), 1 GiB for a system without a desktop, 0.5 GiB for the CUDA context and this runtime.
    TensorRT-RTX doesn't list these capabilities (docs.nvidia.com/deeplearning/tensorrt-rtx, support matrix), and the
    package index has no onnxruntime-gpu for them.
    """
    memory = gib * _GIB
    reserved = memory // 16 + _GIB + _GIB // 2
    return Device(name, capability, memory, bytes_per_second, reserved, (Target.TENSORRT, Target.CPU), compute)


def _geforce(
    name: str, capability: tuple[int, int], gib: int, bytes_per_second: float, compute: Compute | None = None
) -> Device:
    """A GeForce card. Assumed reserve: 0.5 GiB for the driver and a CUDA context, 0.5 GiB for a desktop."""
    targets = (Target.TENSORRT_RTX, Target.TENSORRT, Target.CUDA)
    return Device(name, capability, gib * _GIB, bytes_per_second, _GIB, targets, compute)


DEVICES: Mapping[str, Device] = {
    # 128-bit LPDDR5 at 6,400 MT/s in the Super power modes of JetPack 6.1 and later (25 W, MAXN SUPER). Without them,
    # as first sold, the same module gives 68 GB/s. Jetson Orin Nano Super Developer Kit data sheet, whose 67 sparse
    # int8 TOPS at 1,020 MHz are 16.7 dense fp16 TFLOPS. L2: as CUDA reports it for this module.
    "orin-nano-8gb": _jetson("Jetson Orin Nano 8 GB (Super)", (8, 7), 8, 102e9, Compute(8, 1.02e9, 16.7e12, 2 << 20)),
    # 128-bit LPDDR5 at 6,400 MT/s. Jetson Orin NX series data sheet, DS-10712-001.
    "orin-nx-16gb": _jetson("Jetson Orin NX 16 GB", (8, 7), 16, 102.4e9),
    # 256-bit LPDDR5 at 6,400 MT/s. Jetson AGX Orin series technical brief, whose 170 sparse int8 TOPS of the GPU at
    # 1.3 GHz are 42.5 dense fp16 TFLOPS.
    "agx-orin-64gb": _jetson("Jetson AGX Orin 64 GB", (8, 7), 64, 204.8e9, Compute(16, 1.3e9, 42.5e12, 4 << 20)),
    # 256-bit LPDDR5X at 8,533 MT/s. Jetson T5000 data sheet.
    "agx-thor-128gb": _jetson("Jetson AGX Thor 128 GB (T5000)", (11, 0), 128, 273e9),
    # 128-bit GDDR6 at 17 Gb/s; the card of 2023 with the AD107. NVIDIA's page of the RTX 4060 family.
    "rtx-4060": _geforce("GeForce RTX 4060", (8, 9), 8, 272e9),
    # 384-bit GDDR6X at 21 Gb/s; 165.2 dense TFLOPS with fp32 sums, half of what it does with fp16 sums. NVIDIA Ada GPU
    # architecture paper.
    "rtx-4090": _geforce("GeForce RTX 4090", (8, 9), 24, 1008e9, Compute(128, 2.52e9, 165.2e12, 72 << 20)),
    # 512-bit GDDR7 at 28 Gb/s. NVIDIA RTX Blackwell GPU architecture paper.
    "rtx-5090": _geforce("GeForce RTX 5090", (12, 0), 32, 1792e9),
    # 192-bit GDDR6 at 12.5 Gb/s. NVIDIA L4 data sheet. Assumed reserve: a sixteenth for ECC, which is on as shipped and
    # kept in the same memory, and 0.5 GiB for the driver and a CUDA context. Of TensorRT-RTX's table it has the
    # capability, but it isn't among the RTX cards that the table names, so full TensorRT is the default. 242 sparse
    # fp16 TFLOPS are 121 dense; 30.3 fp32 TFLOPS at 2.04 GHz are 58 SMs. 72 W rarely allow that clock.
    "l4": Device(
        "NVIDIA L4",
        (8, 9),
        24 * _GIB,
        300e9,
        24 * _GIB // 16 + _GIB // 2,
        (Target.TENSORRT, Target.TENSORRT_RTX, Target.CUDA),
        Compute(58, 2.04e9, 121e12, 48 << 20),
    ),
}


def find_device(name: str) -> str:
    """The key in DEVICES for any spelling of it ("RTX 4090", "rtx-4090", "Orin_Nano_8GB").

    Raises:
        BuildError: there is no such device; the message lists those there are.
    """
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    if key not in DEVICES:
        raise BuildError(f"device {name!r} isn't known; accepted: {', '.join(DEVICES)}")
    return key
