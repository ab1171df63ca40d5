"""Devices that a plan can be made for, as data.

Bandwidth is what the data sheet promises, bus width times transfer rate. What the system keeps of the memory is an
assumption, stated once for each kind of device. What a GPU computes is listed for the devices that
docs/plugins-performance.md models.

Compute capabilities are those of NVIDIA's table, "CUDA GPU Compute Capability" (developer.nvidia.com/cuda-gpus): 8.7
AGX Orin, Orin NX, Orin Nano; 8.9 L4, GeForce RTX 4060 and 4090; 11.0 Jetson T5000; 12.0 GeForce RTX 5090. The other
sources stand beside each row; all were compared, in November 2026, with pages that quote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_aot.engines.spec.targets import Target
from qwen_aot.errors import BuildError

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
    TensorRT-RTX's support matrix (docs.nvidia.com/deeplearning/tensorrt-rtx) doesn't list these capabilities, and the
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
    # 128-bit LPDDR5 at 6,400 MT/s, 102 GB/s, in the Super power modes of JetPack 6.1 and later (25 W, MAXN SUPER).
    # Without them, as first sold, the same module gives 68 GB/s at a GPU clock of 625 MHz. Jetson Orin Nano Super
    # Developer Kit data sheet: 1,024 CUDA cores (8 SMs), 1,020 MHz, 67 sparse int8 TOPS, which are 16.7 dense fp16
    # TFLOPS. L2: as CUDA's deviceQuery reports it for an Orin of 8 SMs.
    "orin-nano-8gb": _jetson("Jetson Orin Nano 8 GB (Super)", (8, 7), 8, 102e9, Compute(8, 1.02e9, 16.7e12, 2 << 20)),
    # 128-bit LPDDR5 at 6,400 MT/s, 102.4 GB/s. Jetson Orin NX series data sheet, DS-10712-001 v1.1.
    "orin-nx-16gb": _jetson("Jetson Orin NX 16 GB", (8, 7), 16, 102.4e9),
    # 256-bit LPDDR5 at 6,400 MT/s, 204.8 GB/s. Jetson AGX Orin series data sheet, DS-10662-001 v1.8. Technical brief
    # v1.2: 16 SMs, 4 MB of L2, and 170 sparse int8 TOPS of the GPU at 1.3 GHz, which are 42.5 dense fp16 TFLOPS.
    "agx-orin-64gb": _jetson("Jetson AGX Orin 64 GB", (8, 7), 64, 204.8e9, Compute(16, 1.3e9, 42.5e12, 4 << 20)),
    # 256-bit LPDDR5X at 4,266 MHz (8,533 MT/s), 273 GB/s. Jetson Thor series data sheet, T5000.
    "agx-thor-128gb": _jetson("Jetson AGX Thor 128 GB (T5000)", (11, 0), 128, 273e9),
    # 128-bit GDDR6 at 17 Gb/s, 272 GB/s; the card of 2023 with the AD107. NVIDIA's page of the RTX 4060 family.
    "rtx-4060": _geforce("GeForce RTX 4060", (8, 9), 8, 272e9),
    # 384-bit GDDR6X at 21 Gb/s, 1,008 GB/s; 128 SMs at 2,520 MHz, 72 MB of L2; 165.2 dense TFLOPS with fp32 sums, half
    # of what it does with fp16 sums. NVIDIA Ada GPU architecture paper, v2.01.
    "rtx-4090": _geforce("GeForce RTX 4090", (8, 9), 24, 1008e9, Compute(128, 2.52e9, 165.2e12, 72 << 20)),
    # 512-bit GDDR7 at 28 Gb/s, 1,792 GB/s. NVIDIA RTX Blackwell GPU architecture paper.
    "rtx-5090": _geforce("GeForce RTX 5090", (12, 0), 32, 1792e9),
    # 192-bit GDDR6 at 12.5 Gb/s, 300 GB/s, 242 sparse fp16 TFLOPS, which are 121 dense. NVIDIA L4 data sheet. Its 30.3
    # fp32 TFLOPS at 2,040 MHz are 58 SMs; lists that say 7,680 cores, 60 SMs, count the whole AD104, whose 48 MB of L2
    # it has. 72 W rarely allow that clock. Assumed reserve: a sixteenth for ECC, which is on as shipped and kept in the
    # same memory, and 0.5 GiB for the driver and a CUDA context. TensorRT-RTX's support matrix has its capability, but
    # it isn't an RTX card, so full TensorRT is the default.
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
