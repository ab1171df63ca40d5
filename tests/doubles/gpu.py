"""A GPU of host memory that forgives nothing: what real hardware answers with rubbish or a crash is an error here.

Work is done when the host waits for it and not before, as late as real hardware may. Memory is filled with 0xFF when it
is allocated (NaN in every float type, -1 in integers), and so is what a pending copy will overwrite.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

POISON = 0xFF
ALIGNMENT = 256


class MisuseError(AssertionError):
    """The program did what CUDA or TensorRT leaves undefined, or says not to do."""


class StatusError(Exception):
    """A call fails with a status, as it would on hardware."""

    def __init__(self, status: str) -> None:
        self.status = status
        super().__init__(status)


class Operation(Protocol):
    """Work for a stream: `begin` when it is asked for (at each replay too), `execute` when its turn comes."""

    def begin(self) -> None: ...

    def execute(self) -> None: ...


class MemoryUser(Protocol):
    """What must end before memory that it uses."""

    def _uses(self, address: int, size: int) -> bool: ...


@dataclass
class Allocation:
    """Live memory; `kind` is device or pinned."""

    address: int
    size: int
    kind: str
    memory: ctypes.Array[ctypes.c_uint8]  # somewhat larger: the address in it is aligned


@dataclass
class Stream:
    """Pending operations, and those of a capture while there is one."""

    pending: list[Operation] = field(default_factory=list)
    captured: list[Operation] | None = None


@dataclass
class Graph:
    """What a capture recorded; an executable graph is one too."""

    operations: list[Operation]


class Gpu:
    """Everything that exists on the double, and the faults it is told to have.

    Attributes:
        calls: of each CUDA function and TensorRT method, so far.
        log: what was destroyed and executed, in order.
        misuses: messages of every MisuseError raised, whoever may have caught it.
        lost: the status that every call gives after a sticky error.
        fault: the status that the call now at work is to give.
        compiled: kernels that TensorRT-RTX compiled here, in order.
        refuses_cache: what TensorRT-RTX refuses of a runtime cache: that it is "made", "taken" by a configuration, or
            "serialized".
    """

    def __init__(
        self,
        *,
        name: str = "Double RTX",
        capability: tuple[int, int] = (8, 9),
        total_bytes: int = 1 << 30,
        others_bytes: int = 0,
        is_integrated: bool = False,
        count: int = 1,
        driver: int = 13000,
    ) -> None:
        self.name = name
        self.capability = capability
        self.total_bytes = total_bytes
        self.is_integrated = is_integrated
        self.count = count
        self.driver = driver
        self.others_bytes = others_bytes  # of other programs
        self.reserved_bytes = 0  # by engines for their weights
        self.allocations: dict[int, Allocation] = {}
        self.streams: dict[int, Stream] = {}
        self.graphs: dict[int, Graph] = {}
        self.executables: dict[int, Graph] = {}
        self.objects: Counter[str] = Counter()  # of TensorRT, alive
        self.contexts: weakref.WeakSet[MemoryUser] = weakref.WeakSet()
        self.calls: Counter[str] = Counter()
        self.log: list[str] = []
        self.libraries: list[Path] = []  # of plugins, in the order in which they were loaded
        self.misuses: list[str] = []
        self.lost: str | None = None
        self.fault: str | None = None
        self.compiled: list[str] = []
        self.refuses_cache: str | None = None
        self._faults: dict[str, tuple[int, str]] = {}  # call -> (which of its calls, status)
        self._next_handle = 1

    # Faults

    def fail(self, call: str, status: str = "cudaErrorUnknown", nth: int = 1) -> None:
        """Makes the nth of the coming calls of a function fail."""
        self._faults[call] = (self.calls[call] + nth, status)

    def count_call(self, call: str) -> str | None:
        """Counts a call; returns the status it is to fail with."""
        self.calls[call] += 1
        which, status = self._faults.get(call, (0, ""))
        return status if which == self.calls[call] else None

    def lose(self, status: str) -> None:
        """A sticky error: nothing runs any more."""
        self.lost = status
        for stream in self.streams.values():
            stream.pending = []

    @property
    def untold_faults(self) -> list[str]:
        """Calls that were to fail and haven't been made."""
        return [call for call, (which, _) in self._faults.items() if which > self.calls[call]]

    def misuse(self, message: str) -> MisuseError:
        """Notes a misuse; to be raised."""
        self.misuses.append(message)
        return MisuseError(message)

    # Memory

    @property
    def used_bytes(self) -> int:
        """Of device memory."""
        return (
            self.others_bytes
            + self.reserved_bytes
            + sum(a.size for a in self.allocations.values() if a.kind == "device")
        )

    def allocate(self, size: int, kind: str) -> int:
        """Poisoned memory.

        Raises:
            StatusError: there is none.
        """
        if size <= 0:
            raise self.misuse(f"{size} bytes of {kind} memory asked for")
        if kind == "device" and self.used_bytes + size > self.total_bytes:
            raise StatusError("cudaErrorMemoryAllocation")
        memory = (ctypes.c_uint8 * (size + ALIGNMENT))()
        address = -(-ctypes.addressof(memory) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(address, POISON, size)
        self.allocations[address] = Allocation(address, size, kind, memory)
        return address

    def free(self, address: int, kind: str) -> None:
        """Frees memory by the address that `allocate` gave."""
        found = self.allocations.get(address)
        if found is None or found.kind != kind:
            raise self.misuse(f"{address:#x} was freed as {kind} memory and is none")
        if any(stream.pending for stream in self.streams.values()):
            raise self.misuse(f"{kind} memory was freed while work is pending")
        if kind == "device" and any(context._uses(address, found.size) for context in self.contexts):
            raise self.misuse("device memory was freed while an execution context is alive that uses it")
        del self.allocations[address]

    def check_range(self, address: int, size: int, kind: str) -> None:
        """Refuses memory that isn't wholly inside one live allocation of a kind."""
        for found in self.allocations.values():
            if found.address <= address and address + size <= found.address + found.size:
                if found.kind != kind:
                    raise self.misuse(f"{size} bytes at {address:#x} are {found.kind} memory; needed: {kind}")
                return
        raise self.misuse(f"{size} bytes at {address:#x} are in no live {kind} memory")

    def view(self, address: int, size: int) -> NDArray[np.uint8]:
        """The content of memory."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    # Streams

    def new_handle(self) -> int:
        """A number that no other object has."""
        self._next_handle += 1
        return self._next_handle

    def stream(self, handle: object) -> Stream:
        """A live stream by its handle."""
        number = int(handle)  # type: ignore[call-overload]
        if number not in self.streams:
            raise self.misuse(f"{number} is no stream")
        return self.streams[number]

    def submit(self, stream: Stream, operation: Operation) -> None:
        """Asks for work, or records it where a capture is open."""
        if stream.captured is not None:
            stream.captured.append(operation)
            return
        operation.begin()
        stream.pending.append(operation)

    def synchronize(self, stream: Stream) -> None:
        """Does a stream's work.

        Raises:
            StatusError: some of it failed; nothing after it is done.
        """
        pending, stream.pending = stream.pending, []
        for operation in pending:
            operation.execute()

    def refuse_in_capture(self, call: str) -> None:
        """Refuses calls that end a capture, or that a capture can't see."""
        if any(stream.captured is not None for stream in self.streams.values()):
            raise self.misuse(f"{call} was called while a stream is being captured")

    # Leaks

    def assert_empty(self) -> None:
        """Nothing is left, and nothing was misused."""
        assert not self.misuses, self.misuses
        left = {
            "allocations": len(self.allocations),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
            "executable graphs": len(self.executables),
            **self.objects,
        }
        assert not any(left.values()), f"left on the GPU: { {name: n for name, n in left.items() if n} }"
        assert self.reserved_bytes == 0
