"""Kernels run interpreted on the CPU, or on a GPU where TRITON_INTERPRET=0 was set (tests/plugins/test_gpu.py does)."""

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if IS_INTERPRETED:
    from tests.plugins import interpreter

    interpreter.install()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if IS_INTERPRETED else "cuda")
