"""TensorRT engines with the project's plugins on a GPU, against transformers and against TensorRT's own layers.

The library is the one that QWEN_AOT_PLUGIN_LIBRARY names (`python -m plugins.library` builds it).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.build import build_bundle
from engines.plugin_library import ENVIRONMENT
from engines.spec import BuildSpec
from engines.tensorrt_options import TensorRtOptions
from runtime.backends.tensorrt import TensorRtEngine
from runtime.bundle import load_bundle
from tests.checkpoints import reference_logits, save_tiny
from tests.gpu.test_tensorrt import ids, prompt_of

pytestmark = [pytest.mark.gpu, pytest.mark.trt]

CONTEXT, ROWS, CHUNK = 1024, 4, 32
CASES: dict[str, dict[str, Any]] = {
    "mha": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256},
    "gqa": {"heads": 8, "kv_heads": 2, "head_dim": 128, "hidden": 256},
    "moe": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256, "moe": {"moe_intermediate_size": 128}},
}
# Largest difference of logits (std 1) from transformers in fp32, by the form of cache and experts.
BOUNDS = {"fp16": 5e-2, "int8 cache": 2e-1, "int8": 0.5}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp16": ("fp16", {}),
    "int8 cache": ("fp16", {"kv_precision": "int8"}),
    "int8": ("int8", {}),
}


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    pytest.importorskip("tensorrt")
    if not os.environ.get(ENVIRONMENT):
        pytest.skip(f"no plugin library is named by {ENVIRONMENT}")


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param) / "checkpoint"
    return path, save_tiny(path, max_position_embeddings=CONTEXT, **CASES[request.param])


def build(checkpoint: Path, out: Path, precision: str, **options: Any) -> Path:
    spec = BuildSpec(
        target="tensorrt",  # type: ignore[arg-type]  # BuildSpec takes names
        precision=precision,  # type: ignore[arg-type]
        max_context=CONTEXT,
        max_batch=ROWS,
        prefill_chunk=CHUNK,
        tensorrt=TensorRtOptions(**options),
    )
    build_bundle(checkpoint, spec, out)
    return out


def rows_of(engine: TensorRtEngine, count: int = 24) -> list[tuple[int, list[int], np.ndarray]]:
    """Unequal rows decoded together, one idle in turn: (row, its tokens, logits of the last) after each step."""
    held = [prompt_of(n, seed=n) for n in (300, 1, 77, CHUNK)]
    found = [(row, list(tokens), engine.prefill(row, ids(*tokens)).copy()) for row, tokens in enumerate(held)]
    for step in range(count):
        new = ids(*prompt_of(ROWS, seed=1000 + step))
        new[step % ROWS] = -1
        logits = engine.decode(0, new)
        for row in np.flatnonzero(new >= 0):
            held[row].append(int(new[row]))
            found.append((int(row), list(held[row]), logits[row].copy()))
    return found


@pytest.mark.parametrize("form", OPTIONS)
def test_logits_are_those_of_transformers(checkpoint: tuple[Path, Any], form: str, tmp_path: Path) -> None:
    precision, options = OPTIONS[form]
    bundle = build(checkpoint[0], tmp_path / "bundle", precision, **options)
    with TensorRtEngine(load_bundle(bundle)) as engine:
        for _, tokens, logits in rows_of(engine):
            want = reference_logits(checkpoint[1], [tokens])[0, -1].numpy()
            np.testing.assert_allclose(logits, want, atol=BOUNDS[form], rtol=0)


def test_plugins_equal_native_layers(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    plugged = build(checkpoint[0], tmp_path / "plugin", "fp16")
    native = build(checkpoint[0], tmp_path / "native", "fp16", attention="native", moe="native")
    with TensorRtEngine(load_bundle(plugged)) as ours, TensorRtEngine(load_bundle(native)) as theirs:
        for (_, _, found), (_, _, want) in zip(rows_of(ours), rows_of(theirs), strict=True):
            np.testing.assert_allclose(found, want, atol=BOUNDS["fp16"], rtol=0)


def test_a_version_compatible_engine_brings_its_own_library(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    bundle = load_bundle(build(checkpoint[0], tmp_path / "bundle", "fp16", version_compatible=True))
    facts = bundle.manifest.tensorrt
    assert facts is not None and facts.plugins is not None and facts.plugins.in_engine
    (bundle.path / facts.plugins.file).unlink()
    tokens = prompt_of(40)
    with TensorRtEngine(bundle) as engine:
        want = reference_logits(checkpoint[1], [tokens])[0, -1].numpy()
        np.testing.assert_allclose(engine.prefill(0, ids(*tokens)), want, atol=BOUNDS["fp16"], rtol=0)
