"""Runs before any test module is imported: the environment of the tests and of every process that they start.

Without a GPU, the plugins' kernels run in Triton's interpreter, which triton decides when it is imported. Nothing else
in the tests runs a Triton kernel. Processes import this checkout's package and its tests, whatever is installed.
No test depends on how long an example takes: a busy machine isn't a fault.
"""

import os
from pathlib import Path

import hypothesis

os.environ.setdefault("TRITON_INTERPRET", "1")
_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(_ROOT / "src"), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
