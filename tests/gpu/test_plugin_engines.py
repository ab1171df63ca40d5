"""Engines with the project's plugins against TensorRT's own layers, built and run through the command line.

The library is the one that QWEN_AOT_PLUGIN_LIBRARY names, or is built here for this machine's GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.plugin_library import ENVIRONMENT
from runtime.backends import open_engine
from runtime.backends._cuda import find_device, load_cuda
from runtime.bundle import load_bundle
from runtime.engine import Engine
from tests.checkpoints import save_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.trt]

CONTEXT, ROWS, CHUNK, STEPS = 1024, 2, 64, 64  # tokens, rows, tokens a prefill step, tokens generated
PROMPTS = (1, CHUNK + 1, 700)  # tokens: alone; one more than a chunk; several parts of the cache in decode
CASES: dict[str, dict[str, Any]] = {
    "mha": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256},
    "gqa": {"heads": 10, "kv_heads": 2, "head_dim": 128, "hidden": 256},
    "moe": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256, "moe": {"moe_intermediate_size": 128}},
}
# Largest difference of logits with std 1. fp16: 11 bits in weights, cache and activations, summed in another order. An
# int8 cache errs by up to 1/254 of a head's largest element, in each key and value.
BOUNDS = {"fp16": 5e-2, "int8": 2e-1}


def cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt")
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    folder = tmp_path_factory.mktemp("library")
    cli("plugins.library", "-o", folder, "--sm", find_device(load_cuda()).compute_capability)
    return folder / "libqwen_aot_plugins.so"


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / "checkpoint"
    save_tiny(path, max_position_embeddings=CONTEXT, **CASES[request.param])
    return path


@pytest.fixture(scope="module")
def native(checkpoint: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TensorRT's own layers: the reference."""
    out = tmp_path_factory.mktemp("native") / "bundle"
    return build(checkpoint, out, library, "--attention", "native", "--moe", "native")


def build(checkpoint: Path, out: Path, library: Path, *options: str) -> Path:
    sizes = {"--max-context": CONTEXT, "--max-batch": ROWS, "--prefill-chunk": CHUNK}
    given = [str(part) for pair in sizes.items() for part in pair]
    verb = ("runtime.cli.main", "build", checkpoint, "-o", out, "--target", "tensorrt", "--precision", "fp16")
    cli(*verb, *given, *options, **{ENVIRONMENT: str(library)})
    return out


def greedy(engine: Engine, prompt: np.ndarray, forced: list[int] | None = None) -> tuple[list[int], np.ndarray]:
    """The largest logit's token after the prompt and each of STEPS tokens, its own or those forced, and all logits."""
    engine.truncate(0, 0)
    logits = [engine.prefill(0, prompt).copy()]
    tokens = [int(logits[0].argmax())]
    for step in range(STEPS):
        token = tokens[-1] if forced is None else forced[step]
        logits.append(engine.decode(0, np.array([token], np.int64))[0].copy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, np.stack(logits)


@pytest.mark.parametrize("kv_precision", ["fp16", "int8"])
def test_greedy_tokens_and_logits_are_those_of_native_layers(
    checkpoint: Path, native: Path, library: Path, kv_precision: str, tmp_path: Path
) -> None:
    options = ["--attention", "plugin", "--moe", "plugin"]
    if kv_precision == "int8":
        options += ["--kv-precision", "int8"]
    bundle = build(checkpoint, tmp_path / "bundle", library, *options)
    bound = BOUNDS[kv_precision]
    with open_engine(load_bundle(bundle)) as ours, open_engine(load_bundle(native)) as theirs:
        for count in PROMPTS:
            prompt = np.random.default_rng(count).integers(0, 131, count)
            want, want_logits = greedy(theirs, prompt)
            found, found_logits = greedy(ours, prompt, forced=want)
            np.testing.assert_allclose(found_logits, want_logits, atol=bound, rtol=0)
            second, first = np.sort(want_logits, axis=-1)[:, -2:].T
            is_clear = first - second > 2 * bound  # else both may be right
            assert is_clear.any()
            assert [token for token, clear in zip(found, is_clear, strict=True) if clear] == [
                token for token, clear in zip(want, is_clear, strict=True) if clear
            ]
