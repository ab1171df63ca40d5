"""Before any test module is imported: one of them may import triton, which decides then whether kernels are interpreted.

Without a GPU, the plugins' kernels run in Triton's interpreter. Nothing else in the tests runs a Triton kernel.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
