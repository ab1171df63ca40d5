"""What a program of each variant takes of its SM, from the machine code; kept in resources.json beside this file.

`python -m qwen_aot.plugins.performance --update FOLDER` makes that file anew from what `plugins.aot` compiled into
FOLDER. It has the fp16 variants of every SM: those of bf16 differ little.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from qwen_aot.errors import BuildError
from qwen_aot.plugins.aot import cuda_tool
from qwen_aot.plugins.performance.machine_code import MainLoop, main_loop
from qwen_aot.plugins.variants import SMS, Variant, variants

FILE = Path(__file__).with_name("resources.json")

LOOPING = (
    *("gqa_prefill", "gqa_decode", "moe_gate_up", "moe_down", "moe_decode_gate_up", "moe_decode_down"),
    *("linear_decode", "linear_prefill"),
)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program takes.

    Attributes:
        registers: Of each thread.
        shared_bytes: Of the program.
        spill_bytes: Of each thread.
        loop: Over K or over slots (of two loops, the unmasked one), in the kernels of `LOOPING`.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int = 0
    loop: MainLoop = field(default_factory=MainLoop)


def _from_row(row: Sequence[Any]) -> Resources:
    """What `_row` made."""
    registers, shared_bytes, spill_bytes, instructions, products, shuffles, barriers, loads = row
    by_width = {int(width): count for width, count in loads.items()}
    loop = MainLoop(instructions, products, shuffles, barriers, by_width)
    return Resources(registers, shared_bytes, spill_bytes, loop)


def _row(used: Resources) -> list[Any]:
    return [*astuple(used)[:3], *astuple(used.loop)]


@functools.cache
def recorded() -> Mapping[str, Mapping[str, Resources]]:
    """Resources by SM and variant name, from resources.json."""
    return {
        sm: {name: _from_row(row) for name, row in listed.items()}
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


def measured_one(cubin: Path, variant: Variant, entry: Mapping[str, Any]) -> Resources:
    """Resources of a variant, from its machine code and its entry of the manifest."""
    loop = MainLoop()
    if variant.kernel in LOOPING:
        loop = main_loop(cuda_tool("cuobjdump", "--dump-sass", str(cubin)))
    used = entry["resources"]
    return Resources(used["registers"], entry["shared_bytes"], used["spill_bytes"], loop)


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
            result[sm][variant.name] = measured_one(target / entry["file"], variant, entry)
    return result


def write(folder: Path) -> None:
    """Makes resources.json anew."""
    data = {sm: {name: _row(used) for name, used in listed.items()} for sm, listed in measured(folder).items()}
    lines = [
        f'  "{sm}": {{\n'
        + ",\n".join(f'    "{name}": {json.dumps(values)}' for name, values in listed.items())
        + "\n  }"
        for sm, listed in data.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
