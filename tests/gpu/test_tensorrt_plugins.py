"""TensorRT engines with the project's plugins, against transformers and against TensorRT's own layers.

Bundles are built through the command line, in processes of their own. The library is the one that
QWEN_AOT_PLUGIN_LIBRARY names, or is built here for this machine's GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.plugin_library import ENVIRONMENT
from plugins.aot import PTX_SM
from plugins.library import FILE_NAME
from plugins.variants import SMS
from runtime.backends import open_engine
from runtime.backends._cuda import find_device, load_cuda
from runtime.backends.tensorrt import TensorRtEngine
from runtime.bundle import load_bundle
from runtime.engine import Engine
from tests.checkpoints import reference_logits, save_tiny
from tests.gpu.test_tensorrt import ids, prompt_of

pytestmark = [pytest.mark.gpu, pytest.mark.trt]

CONTEXT, ROWS, CHUNK, STEPS = 1024, 4, 32, 64  # tokens, rows, tokens a prefill step, tokens generated
PROMPTS = (1, CHUNK + 1, 700)  # tokens: alone; one more than a chunk; several parts of the cache in decode
CASES: Mapping[str, Mapping[str, Any]] = {
    "mha": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256},
    "gqa": {"heads": 10, "kv_heads": 2, "head_dim": 128, "hidden": 256},
    "moe": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256, "moe": {"moe_intermediate_size": 128}},
}


@dataclass(frozen=True, slots=True)
class Form:
    """What is asked of a build, and the largest difference of its logits, of std 1, from transformers in fp32."""

    options: tuple[str, ...]
    bound: float


FORMS = {
    "fp16": Form((), 5e-2),  # 11 bits in weights, cache and activations
    # Errs by up to 1/254 of a head's largest element, in each key and value.
    "int8 cache": Form(("--kv-precision", "int8"), 2e-1),
    "int8": Form(("--precision", "int8"), 0.5),  # every weight by up to 1/254 of its row's largest one
}
NATIVE = ("--attention", "native", "--moe", "native")


def cli(*arguments: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt")
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    folder = tmp_path_factory.mktemp("library")
    sm = find_device(load_cuda()).compute_capability
    cli("plugins.library", "-o", folder, "--sm", sm if sm in SMS else PTX_SM)
    return folder / FILE_NAME


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint, and its model of transformers."""
    path = tmp_path_factory.mktemp(request.param) / "checkpoint"
    return path, save_tiny(path, max_position_embeddings=CONTEXT, **CASES[request.param])


@pytest.fixture(scope="module")
def plugged(checkpoint: tuple[Path, Any], library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of each form, with plugins."""
    folder = tmp_path_factory.mktemp("plugged")
    return {
        name: build(checkpoint[0], folder / name.replace(" ", "-"), library, *form.options)
        for name, form in FORMS.items()
    }


@pytest.fixture(scope="module")
def native(checkpoint: tuple[Path, Any], library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle in fp16, of TensorRT's own layers."""
    return build(checkpoint[0], tmp_path_factory.mktemp("native") / "bundle", library, *NATIVE)


def build(checkpoint: Path, out: Path, library: Path, *options: str) -> Path:
    sizes = {"--max-context": CONTEXT, "--max-batch": ROWS, "--prefill-chunk": CHUNK}
    given = [str(part) for pair in sizes.items() for part in pair]
    verb = ("runtime.cli.main", "build", checkpoint, "-o", out, "--target", "tensorrt")
    cli(*verb, *given, *options, **{ENVIRONMENT: str(library)})
    return out


def rows_of(engine: Engine, count: int = 24) -> list[tuple[int, list[int], np.ndarray]]:
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


def greedy(engine: Engine, prompt: Sequence[int], forced: list[int] | None = None) -> tuple[list[int], np.ndarray]:
    """The largest logit's token after the prompt and each of STEPS tokens, its own or those forced, and all logits."""
    engine.truncate(0, 0)
    logits = [engine.prefill(0, ids(*prompt)).copy()]
    tokens = [int(logits[0].argmax())]
    for step in range(STEPS):
        logits.append(engine.decode(0, ids(tokens[-1] if forced is None else forced[step]))[0].copy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, np.stack(logits)


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers(checkpoint: tuple[Path, Any], plugged: dict[str, Path], form: str) -> None:
    with open_engine(load_bundle(plugged[form])) as engine:
        for _, tokens, logits in rows_of(engine):
            want = reference_logits(checkpoint[1], [tokens])[0, -1].numpy()
            np.testing.assert_allclose(logits, want, atol=FORMS[form].bound, rtol=0)


def test_unequal_and_idle_rows_are_those_of_native_layers(plugged: dict[str, Path], native: Path) -> None:
    with open_engine(load_bundle(plugged["fp16"])) as ours, open_engine(load_bundle(native)) as theirs:
        for (_, _, found), (_, _, want) in zip(rows_of(ours), rows_of(theirs), strict=True):
            np.testing.assert_allclose(found, want, atol=FORMS["fp16"].bound, rtol=0)


@pytest.mark.parametrize("form", ["fp16", "int8 cache"])
def test_greedy_tokens_are_those_of_native_layers(plugged: dict[str, Path], native: Path, form: str) -> None:
    bound = FORMS[form].bound
    with open_engine(load_bundle(plugged[form])) as ours, open_engine(load_bundle(native)) as theirs:
        for count in PROMPTS:
            prompt = prompt_of(count, seed=count)
            want, want_logits = greedy(theirs, prompt)
            found, found_logits = greedy(ours, prompt, forced=want)
            np.testing.assert_allclose(found_logits, want_logits, atol=bound, rtol=0)
            second, first = np.sort(want_logits, axis=-1)[:, -2:].T
            is_clear = first - second > 2 * bound  # else both may be right
            assert is_clear.any()
            np.testing.assert_array_equal(np.array(found)[is_clear], np.array(want)[is_clear])


def test_a_replayed_graph_equals_plain_steps(plugged: dict[str, Path]) -> None:
    """Nothing that enqueue does hinders a capture, and what was captured follows lengths that grow."""
    prompt, results = prompt_of(60, seed=3), []
    for use_graphs in (True, False):
        with TensorRtEngine(load_bundle(plugged["fp16"])) as engine:
            assert engine._decode is not None
            graphs = engine._decode._graphs
            assert graphs is not None
            if not use_graphs:
                engine._decode._graphs = None
            results.append(greedy(engine, prompt)[1])
            assert graphs._is_on and len(graphs) == int(use_graphs)
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)  # the same kernels


def test_closing_gives_the_memory_back(plugged: dict[str, Path]) -> None:
    """Kernels that plugins loaded too: they go with the last plugin of a context."""
    cuda, free = load_cuda(), []
    for _ in range(6):
        with open_engine(load_bundle(plugged["fp16"])) as engine:
            greedy(engine, prompt_of(20))
        free.append(cuda.call("cudaMemGetInfo")[0])
    assert max(free[1:]) - min(free[1:]) < 4 << 20  # the first one loads libraries


def test_a_version_compatible_engine_brings_its_own_library(
    checkpoint: tuple[Path, torch.nn.Module], library: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(build(checkpoint[0], tmp_path / "bundle", library, "--version-compatible"))
    facts = bundle.manifest.tensorrt
    assert facts is not None and facts.plugins is not None and facts.plugins.in_engine
    (bundle.path / facts.plugins.file).unlink()
    tokens = prompt_of(40)
    with open_engine(bundle) as engine:
        want = reference_logits(checkpoint[1], [tokens])[0, -1].numpy()
        np.testing.assert_allclose(engine.prefill(0, ids(*tokens)), want, atol=FORMS["fp16"].bound, rtol=0)
