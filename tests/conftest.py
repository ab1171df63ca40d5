"""Runs before any test module is imported: one may import triton, which then decides whether kernels are interpreted.

Without a GPU, the plugins' kernels run in Triton's interpreter. Nothing else in the tests runs a Triton kernel.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
