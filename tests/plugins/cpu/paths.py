"""The sets of instructions that this CPU can execute."""

from __future__ import annotations

import platform
from pathlib import Path

FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def _executable() -> list[str]:
    if platform.machine() == "aarch64":
        return ["portable", "neon"]
    info = Path("/proc/cpuinfo").read_text()
    flags = set(next((line for line in info.splitlines() if line.startswith("flags")), "").split())
    return ["portable", *(name for name, needed in FLAGS.items() if needed <= flags)]


PATHS = _executable()
