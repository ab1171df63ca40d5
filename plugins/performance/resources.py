"""What a program of each variant takes of its SM, from the machine code; kept in resources.json beside this file.

`python -m plugins.performance --update FOLDER` makes that file anew from what `plugins.aot` compiled into FOLDER. It
has the fp16 variants of the SMs that docs/plugins-performance.md is about: those of bf16 differ little.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from plugins.aot import cuda_tool
from plugins.variants import Variant, variants
from qwen_aot_errors import BuildError

SMS = ("8.7", "8.9")
FILE = Path(__file__).with_name("resources.json")

# Integer to floating point, one lane an instruction. I2F of 32-bit sizes and reciprocals (I2F.RP) is no part of tiles.
_CONVERSION = re.compile(r"\bI2F(?:\.F16)?\.[SU](?:8|16)\b")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program takes.

    Attributes:
        registers: Of each thread.
        shared_bytes: Of the program.
        conversion_repeats: How often each integer of a tile is converted: once, or by several warps that each need all.
    """

    registers: int
    shared_bytes: int
    conversion_repeats: float


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
                    f"{target} lacks {variant.name}: compile it with `python -m plugins.aot --sm {sm} -o {folder}`"
                ) from None
            result[sm][variant.name] = Resources(
                entry["resources"]["registers"],
                entry["shared_bytes"],
                _conversion_repeats(variant, target / entry["file"]),
            )
    return result


def _conversion_repeats(variant: Variant, cubin: Path) -> float:
    constants = variant.constants
    if constants.get("IS_INT8") and variant.kernel in ("gqa_prefill", "gqa_decode"):
        tile = 2 * constants["BLOCK_N"] * constants["D"]  # keys and values
    elif constants.get("WEIGHT_BITS", 16) < 16:
        matrices = 2 if variant.kernel.endswith("gate_up") else 1
        tile = matrices * constants["BLOCK_N"] * constants["BLOCK_K"]
    else:
        return 1.0
    loops = 2 if variant.kernel == "gqa_prefill" else 1  # with and without a mask
    found = len(_CONVERSION.findall(cuda_tool("cuobjdump", "--dump-sass", str(cubin))))
    return found * 32 * variant.num_warps / (tile * loops)


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
