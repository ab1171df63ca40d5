"""What a program of each variant takes of its SM, from the machine code; kept in resources.json beside this file.

`python -m qwen_aot.plugins.performance --update FOLDER` makes that file anew from what `plugins.aot` compiled into
FOLDER. It has the fp16 variants of the SMs that docs/plugins-performance.md is about: those of bf16 differ little.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_aot.errors import BuildError
from qwen_aot.plugins.aot import TENSOR_CORE, cuda_tool
from qwen_aot.plugins.variants import Variant, variants

SMS = ("8.7", "8.9")
FILE = Path(__file__).with_name("resources.json")

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);")
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
_LOOPING = ("gqa_prefill", "gqa_decode", "moe_gate_up", "moe_down", "moe_decode_gate_up", "moe_decode_down")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program takes.

    Attributes:
        registers: Of each thread.
        shared_bytes: Of the program.
        step_instructions: Of one warp in one step of the loop over K or over slots (of two loops, the unmasked one);
            0 of kernels without one.
    """

    registers: int
    shared_bytes: int
    step_instructions: int


@functools.cache
def recorded() -> Mapping[str, Mapping[str, Resources]]:
    """Resources by SM and variant name, from resources.json."""
    return {
        sm: {name: Resources(*values) for name, values in listed.items()}
        for sm, listed in json.loads(FILE.read_bytes()).items()
    }


def resources_of(sm: str, variant: Variant) -> Resources:
    """The recorded resources of a variant.

    Raises:
        BuildError: There are none for it.
    """
    try:
        return recorded()[sm][variant.name]
    except KeyError:
        raise BuildError(
            f"no resources are recorded of {variant.name} for SM {sm}; there are those of fp16 for SM {', '.join(SMS)}"
        ) from None


def measured(folder: Path, sms: tuple[str, ...] = SMS) -> dict[str, dict[str, Resources]]:
    """Resources of the fp16 variants (and those without a dtype) that `plugins.aot` compiled into a folder.

    Raises:
        BuildError: The folder lacks one.
    """
    result: dict[str, dict[str, Resources]] = {}
    for sm in sms:
        target = folder / f"sm_{sm.replace('.', '')}"
        result[sm] = {}
        for variant in variants(sm):
            if variant.match.get("dtype") == "bf16":
                continue
            try:
                entry = json.loads((target / f"{variant.name}.json").read_bytes())
            except OSError:
                raise BuildError(
                    f"{target} lacks {variant.name}: compile it with "
                    f"`python -m qwen_aot.plugins.aot --sm {sm} -o {folder}`"
                ) from None
            result[sm][variant.name] = Resources(
                entry["resources"]["registers"],
                entry["shared_bytes"],
                step_instructions(cuda_tool("cuobjdump", "--dump-sass", str(target / entry["file"])))
                if variant.kernel in _LOOPING
                else 0,
            )
    return result


def step_instructions(sass: str) -> int:
    """Instructions of a kernel's main loop: the one with most tensor-core instructions, else the longest.

    Of loops with equally many, it is the shortest: the other one's are masks.
    """
    listed = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(sass)]
    bodies = []
    for address, text in listed:
        branch = _BRANCH.search(text)
        if branch is not None and int(branch[1], 16) < address:
            bodies.append([inside for at, inside in listed if int(branch[1], 16) <= at <= address])
    products = [sum(bool(TENSOR_CORE.search(text)) for text in body) for body in bodies]
    if any(products):
        return min(len(body) for body, count in zip(bodies, products, strict=True) if count == max(products))
    return max(map(len, bodies), default=0)


def write(folder: Path) -> None:
    """Makes resources.json anew."""
    data = {
        sm: {name: list(asdict(used).values()) for name, used in listed.items()}
        for sm, listed in measured(folder).items()
    }
    lines = [
        f'  "{sm}": {{\n'
        + ",\n".join(f'    "{name}": {json.dumps(values)}' for name, values in listed.items())
        + "\n  }"
        for sm, listed in data.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
