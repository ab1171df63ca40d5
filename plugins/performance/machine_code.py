"""The main loop of a kernel: what a warp executes in a step, from machine code that `cuobjdump --dump-sass` lists."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from qwen_aot.plugins.aot import TENSOR_CORE

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
_GUARD = re.compile(r"^@!?U?P\w+\s+")
_BARRIERS = ("BAR.SYNC", "BAR.RED")  # all warps of a program wait; not those of one warp group or of memory
_LOADS = ("LDG", "LDGSTS")  # from global memory: into registers, into shared memory
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # by modifier; 4 bytes without one


@dataclass(frozen=True, slots=True)
class MainLoop:
    """One step of the loop over K or over slots; all zero of a kernel without one.

    Attributes:
        instructions: Of one warp. Where code lies between the loop's ends that only some steps execute, it counts.
        products: Tensor-core instructions: of a warp (HMMA), of four warps (HGMMA) or of the program (UTCHMMA).
        shuffles: SHFL.
        barriers: At which all warps of the program wait.
        loads: Loads of global memory by a thread's bytes, into registers or, asynchronously, into shared memory.
    """

    instructions: int = 0
    products: int = 0
    shuffles: int = 0
    barriers: int = 0
    loads: Mapping[int, int] = field(default_factory=dict)


def _opcode(text: str) -> str:
    return _GUARD.sub("", text.strip()).split()[0]


def _width(opcode: str) -> int:
    return next((_WIDTHS[part] for part in opcode.split(".") if part in _WIDTHS), 4)


def main_loop(sass: str) -> MainLoop:
    """The loop with most tensor-core instructions, else the longest; of several with equally many, the shortest.

    A loop is what lies between a branch backwards and its target, unless the program ends between them: then the branch
    leads back from code that was moved behind the end, such as another try of a wait. Of two loops with equally many
    products, the longer one masks what it loads.
    """
    listed = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    bodies = []
    for address, text in listed:
        branch = _BRANCH.search(text)
        if branch is not None and int(branch[1], 16) < address:
            inside = [other for at, other in listed if int(branch[1], 16) <= at <= address]
            if not any(other.strip() == "EXIT" for other in inside):
                bodies.append([_opcode(other) for other in inside])
    if not bodies:
        return MainLoop()
    products = [sum(bool(TENSOR_CORE.match(opcode)) for opcode in body) for body in bodies]
    if any(products):
        body = min((body for body, count in zip(bodies, products, strict=True) if count == max(products)), key=len)
    else:
        body = max(bodies, key=len)
    return MainLoop(
        instructions=len(body),
        products=max(products),
        shuffles=sum(opcode.startswith("SHFL") for opcode in body),
        barriers=sum(opcode.startswith(_BARRIERS) for opcode in body),
        loads=dict(sorted(Counter(_width(opcode) for opcode in body if opcode.split(".")[0] in _LOADS).items())),
    )
