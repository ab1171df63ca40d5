"""Polygraphy's runner on engines of whichever TensorRT flavours are installed.

Without a GPU the same runner is tested on doubles (tests/engines/verify/test_compare_engine.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.verify.compare_engine import compare_in_process
from qwen_aot.runtime.backends.cuda.runtime import find_device, load_cuda
from tests.checkpoints import save_tiny
from tests.gpu.test_tensorrt import CHUNK, CONTEXT, TARGETS, build

pytestmark = [pytest.mark.gpu, pytest.mark.trt]


@pytest.mark.parametrize("target", TARGETS)
def test_logits_and_caches_of_a_prefill_step(target: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(TARGETS[target]) is None:
        pytest.skip(f"{TARGETS[target]} isn't installed")
    for seed in (0, 1):
        save_tiny(tmp_path / f"checkpoint{seed}", kv_heads=2, max_position_embeddings=CONTEXT, seed=seed)
        reference = BuildSpec(precision=Precision.FP32, max_context=CONTEXT)
        build_bundle(tmp_path / f"checkpoint{seed}", reference, tmp_path / f"reference{seed}")
    build(tmp_path / "checkpoint0", tmp_path / "engine", target, find_device(load_cuda()))
    ids = np.random.default_rng(0).integers(1, 131, CHUNK).tolist()
    same, other = (compare_in_process(tmp_path / "engine", tmp_path / f"reference{seed}", ids, 30.0) for seed in (0, 1))
    assert same["library"] == TARGETS[target]
    assert same["failed"] == []
    assert len(other["failed"]) == len(other["outputs"]) > 1
