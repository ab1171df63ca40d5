"""The sets of instructions that this CPU can execute."""

from __future__ import annotations

import platform
from pathlib import Path

_NEEDED = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "neon": {"asimd"},
    "neon_dot": {"asimd", "asimddp"},
}


def _paths() -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return ["portable", *(name for name, needed in _NEEDED.items() if needed <= flags)]


PATHS = _paths() if platform.system() == "Linux" else ["portable"]
ATTENTION_PATHS = [
    path for path in PATHS if path in ("portable", "avx2", "avx512", "neon")
]  # that attention tells apart
