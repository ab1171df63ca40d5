"""What launches of published shapes execute, as a table: `python -m tests.plugins.ptx.counts KERNELS`.

KERNELS is the folder of one SM that `plugins.aot` wrote ("build/kernels/sm_89"). Each launch is executed from its PTX,
on random values.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.plugins.any_step import Step
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep
from tests.plugins.ptx.interpreter import Counts, Interpreter, PtxError, compile_interpreter
from tests.plugins.ptx.steps import CompiledSteps

SECTOR_BYTES = 32

# One key head (or group of heads) of Qwen1.5's 7B and 32B; one layer of A2.7B, all tokens on the same 4 experts.
_CACHE = {"num_kv_heads": 1, "head_dim": 128, "sm_count": 58}
_EXPERTS = {"hidden_size": 2048, "inner_size": 1408, "num_experts": 4, "k": 4}
_LINEAR = {"rows": 2048, "columns": 2048, "sm_count": 58}  # the output projection of attention in 1.8B
STEPS: dict[str, Callable[[str], Step]] = {
    "decode over 512, one head": lambda sm: GqaStep([(511, 1)], 1, sm=sm, **_CACHE),
    "decode over 512, five heads a group": lambda sm: GqaStep([(511, 1)], 1, group=5, sm=sm, **_CACHE),
    "the same, int8 cache": lambda sm: GqaStep([(511, 1)], 1, group=5, is_int8=True, sm=sm, **_CACHE),
    "prefill of 256 over 256, one head": lambda sm: GqaStep([(256, 256)], 256, sm=sm, **_CACHE),
    "the same prefill, int8 cache": lambda sm: GqaStep([(256, 256)], 256, is_int8=True, sm=sm, **_CACHE),
    "one token, 4 experts": lambda sm: MoeStep(1, sm=sm, **_EXPERTS),
    "one token, int8 experts": lambda sm: MoeStep(1, form="8", sm=sm, **_EXPERTS),
    "one token, int4 experts": lambda sm: MoeStep(1, form="4", sm=sm, **_EXPERTS),
    "64 tokens, 4 experts": lambda sm: MoeStep(64, sm=sm, **_EXPERTS),
    "64 tokens, int8 experts": lambda sm: MoeStep(64, form="8", sm=sm, **_EXPERTS),
    "64 tokens, int4 experts": lambda sm: MoeStep(64, form="4", sm=sm, **_EXPERTS),
    "one token, a projection of 4 bits": lambda sm: LinearStep(1, sm=sm, **_LINEAR),
    "one token, of 8 bits": lambda sm: LinearStep(1, form="8", sm=sm, **_LINEAR),
    "64 tokens, of 4 bits": lambda sm: LinearStep(64, sm=sm, **_LINEAR),
    "64 tokens, of 8 bits": lambda sm: LinearStep(64, form="8", sm=sm, **_LINEAR),
}
_KERNELS = (
    *("gqa_prefill", "gqa_decode", "moe_gate_up", "moe_down", "moe_decode_gate_up", "moe_decode_down"),
    *("linear_decode", "linear_prefill"),
)

# Column: how it is counted. A warp's instruction counts once.
_COLUMNS: Mapping[str, Callable[[Counts], int]] = {
    "instructions": lambda counts: counts.executed(),
    "`mma`": lambda counts: counts.executed("mma."),
    "`ldmatrix`": lambda counts: counts.executed("ldmatrix."),
    "shuffles": lambda counts: counts.executed("shfl.", "redux."),
    "barriers": lambda counts: counts.executed("bar."),
    "waits for copies": lambda counts: counts.executed("cp.async.wait_group"),
    "global bytes read": lambda counts: counts.read.total(),
    "in sectors": lambda counts: SECTOR_BYTES * counts.read_sectors.total(),
    "written": lambda counts: counts.written.total(),
    "shared bytes": lambda counts: counts.bytes("ld.shared", "st.shared", "ldmatrix", "stmatrix", "cp.async"),
}


def table(compiled: CompiledSteps, sm: str) -> str:
    """Markdown: a row for each launch of `STEPS` that does the work of its step."""
    names = ("step", "kernel", *_COLUMNS)
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    for step, make in STEPS.items():
        for variant, counts in compiled.run(make(sm))[1].items():
            if (kernel := variant.split("-")[0]) in _KERNELS:
                cells = [step, f"`{kernel}`", *(f"{count(counts):,}" for count in _COLUMNS.values())]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """The command line. Exit codes: 0 ok, 1 failed, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.plugins.ptx.counts",
        description="Execute the PTX of compiled kernels and print what they did.",
        epilog="Examples:\n  python -m tests.plugins.ptx.counts build/kernels/sm_89\n"
        "  python -m tests.plugins.ptx.counts build/kernels/sm_120",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kernels", type=Path, help="folder of one SM, as `python -m qwen_aot.plugins.aot` writes it")
    kernels = parser.parse_args().kernels
    digits = kernels.resolve().name.removeprefix("sm_")
    if not (kernels / "manifest.json").exists() or not digits.isdecimal():
        print(f"error: {kernels} isn't a folder sm_NN that qwen_aot.plugins.aot wrote", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        compiled = CompiledSteps(Interpreter(compile_interpreter(Path(folder))), kernels)
        try:
            print(table(compiled, f"{digits[:-1]}.{digits[-1]}"))
        except PtxError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
