"""What the CPU's instructions do to a bundle: whether 8-bit products are exact."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["NO_VNNI", "has_exact_integer_products"]

# Environment variable: set to anything, this CPU counts as one without VNNI.
NO_VNNI = "QWEN_AOT_NO_VNNI"


def has_exact_integer_products(root: Path = Path("/")) -> bool:
    """Whether ONNX Runtime's kernels of unsigned times signed 8-bit products are exact on this CPU.

    x86-64 without VNNI adds pairs of products in 16 bits, which saturate: a product may come out half as large.
    Source: ONNX Runtime's documentation of quantization, "When and why do I need to try U8U8?".

    The environment variable QWEN_AOT_NO_VNNI hides VNNI from this function (and from nothing else: the kernels stay
    those of the CPU), to see on any machine what happens on one without.

    Args:
        root: of the file system that describes the system; a system that doesn't tell counts as exact.
    """
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    flags = {flag for line in text.splitlines() if line.startswith("flags") for flag in line.split()}
    if flags and os.environ.get(NO_VNNI):
        flags -= {"avx_vnni", "avx512_vnni"}
    return not flags or bool(flags & {"avx_vnni", "avx512_vnni"})
