"""The interpreter's tests again, compiled and on the GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_gqa.py", "test_moe.py"])
def test_kernels_equal_their_references_on_the_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: a GPU, its driver and a CUDA build of torch are needed")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name)]
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
