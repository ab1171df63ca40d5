"""What bounds a kernel launch on a GPU, and what the launch fills of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_aot.errors import BuildError
from qwen_aot.plugins.performance.costs import Cost
from qwen_aot.plugins.performance.resources import Resources

# Assumed, not measured: from a load to its data in a busy GPU, about twice that of an idle one.
LATENCY_SECONDS = 0.6e-6
# Warp instructions that an SM starts in a cycle, one by each of its four schedulers.
ISSUES_PER_CYCLE = 4
_DEPENDENT_LOADS = (
    2  # before a program's loop: the row's lengths or the expert, then the first tile's addresses are known
)

_REGISTERS = 64 * 1024  # of an SM, 32 bits each
_REGISTER_UNIT = 256  # registers that a warp's are rounded up to
_RESERVED_SHARED_BYTES = 1024  # of each program, by the system


@dataclass(frozen=True, slots=True)
class SmLimits:
    """What can be resident on one SM.

    Sources: CUDA C++ Programming Guide, table of technical specifications by compute capability; for 10.0 and later
    `cuda::arch_traits` of CUDA's core libraries.
    """

    warps: int
    programs: int
    shared_bytes: int


SM_LIMITS: Mapping[str, SmLimits] = {
    "8.0": SmLimits(warps=64, programs=32, shared_bytes=164 * 1024),
    "8.6": SmLimits(warps=48, programs=16, shared_bytes=100 * 1024),
    "8.7": SmLimits(warps=48, programs=16, shared_bytes=164 * 1024),
    "8.9": SmLimits(warps=48, programs=24, shared_bytes=100 * 1024),
    "9.0": SmLimits(warps=64, programs=32, shared_bytes=228 * 1024),
    "10.0": SmLimits(warps=64, programs=32, shared_bytes=228 * 1024),
    "11.0": SmLimits(warps=48, programs=24, shared_bytes=228 * 1024),
    "12.0": SmLimits(warps=48, programs=24, shared_bytes=100 * 1024),
    "12.1": SmLimits(warps=48, programs=24, shared_bytes=100 * 1024),
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as the model sees it; fields as in `engines.planner.devices`."""

    sm: str
    sm_count: int
    clock_hz: float
    bytes_per_second: float
    tensor_flops: float
    l2_bytes: int


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What one launch fills.

    Attributes:
        resident: Programs that an SM holds at once.
        limited_by: "registers", "shared memory", "warps" or "programs".
        warps: Resident, over what an SM can hold.
        waves: Working programs over what the GPU holds at once.
    """

    resident: int
    limited_by: str
    warps: float
    waves: float


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds that a launch can't be faster than, for each reason; what they are is in docs/plugins-performance.md."""

    memory: float
    tensor: float
    issue: float
    latency: float

    @property
    def seconds(self) -> float:
        """The largest."""
        return max(self.memory, self.tensor, self.issue, self.latency)

    @property
    def reason(self) -> str:
        """Which is the largest."""
        reasons = {name: getattr(self, name) for name in ("memory", "tensor", "issue", "latency")}
        return max(reasons, key=lambda name: reasons[name])


def occupancy(gpu: Gpu, cost: Cost, resources: Resources) -> Occupancy:
    """How many programs of a launch run at once.

    Raises:
        BuildError: The limits of the GPU's SM aren't listed.
    """
    limits = SM_LIMITS.get(gpu.sm)
    if limits is None:
        raise BuildError(f"the limits of SM {gpu.sm} aren't listed; those of {', '.join(SM_LIMITS)} are")
    warps = cost.variant.num_warps
    of_warp = -(-resources.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by = {
        "registers": _REGISTERS // of_warp // warps,
        "shared memory": limits.shared_bytes // (resources.shared_bytes + _RESERVED_SHARED_BYTES),
        "warps": limits.warps // warps,
        "programs": limits.programs,
    }
    limited_by = min(by, key=lambda name: by[name])
    resident = by[limited_by]
    return Occupancy(
        resident=resident,
        limited_by=limited_by,
        warps=resident * warps / limits.warps,
        waves=cost.working / (resident * gpu.sm_count),
    )


def bound(gpu: Gpu, cost: Cost, resources: Resources) -> Bound:
    """The bounds of one launch.

    Memory counts each byte once; the keys and values of a head that exceed L2, once for each wave of the programs that
    read them, which are taken to go through them in step. Latency is that of the longest chain of loads: waves times
    the steps of a program, of which `num_stages - 1` are in flight. Issue counts the instructions of the loop alone.
    """
    filled = occupancy(gpu, cost, resources)
    moved = cost.distinct_bytes
    if cost.live_bytes > gpu.l2_bytes:
        cached = sum(
            cost.reads[name].distinct for name in ("key", "value", "key_scale", "value_scale") if name in cost.reads
        )
        moved += (-(-cost.readers // (filled.resident * gpu.sm_count)) - 1) * cached
    chain = _DEPENDENT_LOADS + cost.steps / max(1, cost.variant.num_stages - 1)
    return Bound(
        memory=moved / gpu.bytes_per_second,
        tensor=cost.tensor_flops / gpu.tensor_flops,
        issue=cost.total_steps
        * cost.variant.num_warps
        * resources.loop.instructions
        / (ISSUES_PER_CYCLE * gpu.sm_count * gpu.clock_hz),
        latency=-(-cost.working // (filled.resident * gpu.sm_count)) * chain * LATENCY_SECONDS,
    )
