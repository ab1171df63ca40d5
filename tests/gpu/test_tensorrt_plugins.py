"""TensorRT engines with the project's plugins, against transformers and against TensorRT's own layers.

Bundles are built through the command line, in processes of their own. The library is the one that
QWEN_AOT_PLUGIN_LIBRARY names, or is built here for this machine's GPU.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_aot.plugins.aot import PTX_SM
from qwen_aot.plugins.library import FILE_NAME
from qwen_aot.plugins.variants import SMS
from qwen_aot.runtime.backends.cuda.runtime import find_device, load_cuda
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.plugin_library import PLUGIN_LIBRARY_VARIABLE
from qwen_aot.runtime.engine.protocol import Engine
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.lowering.tensorrt.test_plugin import int8_cache_logits
from tests.exporter.rounded import rounded_experts, rounded_model
from tests.gpu.test_tensorrt import ids, prompt_of

pytestmark = [pytest.mark.gpu, pytest.mark.trt]

CONTEXT, ROWS, CHUNK, STEPS = 1024, 4, 32, 64  # tokens, rows, tokens a prefill step, tokens generated
PROMPTS = (1, CHUNK + 1, 700)  # tokens: alone; one more than a chunk; several parts of the cache in decode
EXPERTS = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
CASES: Mapping[str, Mapping[str, Any]] = {
    "mha": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256, "intermediate": 128},
    "gqa": {"heads": 10, "kv_heads": 2, "head_dim": 128, "hidden": 256, "intermediate": 128},
    "moe": {"heads": 4, "kv_heads": 4, "head_dim": 64, "hidden": 256, "moe": EXPERTS},
}
# Tokens whose experts nearly tie: rounding may choose another one, whose logits are others.
MOST_TIED = {"mha": 0.0, "gqa": 0.0, "moe": 0.05}


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of build.

    Attributes:
        options: What is asked of it.
        weights: The form that `tests.exporter.rounded` gives the reference's weights.
        bound: The largest difference of its logits, of std 1, from transformers in fp32 with these weights and cache.
    """

    options: tuple[str, ...]
    weights: str
    bound: float


FORMS = {
    "fp16": Form(("--precision", "fp16"), "fp16", 5e-2),  # cache and activations have 11 bits
    "bf16": Form(("--precision", "bf16"), "bf16", 4e-1),  # 8 bits
    # A key or value that is rounded in fp16 may take the next code: 1/127 of a head's largest element.
    "int8 cache": Form(("--precision", "fp16", "--kv-precision", "int8"), "fp16", 1e-1),
    "int8": Form(("--precision", "int8"), "int8", 5e-2),
    "int4": Form(("--precision", "int4"), "int4", 5e-2),
}
NATIVE = ("--attention", "native", "--moe", "native")


def cli(*arguments: str | Path, **environment: str) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt")
    if named := os.environ.get(PLUGIN_LIBRARY_VARIABLE):
        return Path(named)
    folder = tmp_path_factory.mktemp("library")
    sm = find_device(load_cuda()).compute_capability
    cli("qwen_aot.plugins.library", "-o", folder, "--sm", sm if sm in SMS else PTX_SM)
    return folder / FILE_NAME


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved model, and itself."""

    case: str
    path: Path
    model: Any

    def expected(self, form: str, tokens: list[int]) -> np.ndarray:
        """Logits [V] after these tokens, of transformers with weights, and cache, rounded as the form has them."""
        model = rounded_model(self.model, FORMS[form].weights, rounds_rotary=False)
        if self.case == "moe" and form in ("int8", "int4"):
            model = rounded_experts(model, form)
        if form == "int8 cache":
            return np.asarray(int8_cache_logits(model, tokens)[-1])
        return np.asarray(reference_logits(model, [tokens])[0, -1])


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp(request.param) / "checkpoint"
    return Checkpoint(request.param, path, save_tiny(path, max_position_embeddings=CONTEXT, **CASES[request.param]))


@pytest.fixture(scope="module")
def plugged(checkpoint: Checkpoint, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a form, with plugins, built when it is first asked for."""
    folder = tmp_path_factory.mktemp("plugged")

    @functools.cache
    def bundle(form: str) -> Path:
        return build(checkpoint.path, folder / form.replace(" ", "-"), library, *FORMS[form].options)

    return bundle


@pytest.fixture(scope="module")
def native(checkpoint: Checkpoint, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle in fp16, of TensorRT's own layers."""
    out = tmp_path_factory.mktemp("native") / "bundle"
    return build(checkpoint.path, out, library, *FORMS["fp16"].options, *NATIVE)


def build(checkpoint: Path, out: Path, library: Path, *options: str) -> Path:
    sizes = {"--max-context": CONTEXT, "--max-batch": ROWS, "--prefill-chunk": CHUNK}
    given = [str(part) for pair in sizes.items() for part in pair]
    verb = ("qwen_aot", "build", checkpoint, "-o", out, "--target", "tensorrt")
    cli(*verb, *given, *options, **{PLUGIN_LIBRARY_VARIABLE: str(library)})
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


def errors_of(found: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> np.ndarray:
    """The largest difference in each of [n, V] logits."""
    return np.asarray(np.abs(np.stack(found) - np.stack(want)).max(axis=-1))


def assert_near(errors: np.ndarray, bound: float, case: str) -> None:
    beyond = np.flatnonzero(errors > bound)
    assert len(beyond) <= MOST_TIED[case] * len(errors), f"of {len(errors)} logits, {errors[beyond]} beyond {bound}"


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers(checkpoint: Checkpoint, plugged: Callable[[str], Path], form: str) -> None:
    if form == "bf16" and checkpoint.case == "moe":
        pytest.skip("8 bits let too many tokens take another expert; the kernels have tests of their own")
    with open_engine(load_bundle(plugged(form)), allow_bundle_code=True) as engine:
        rows = rows_of(engine)
    want = [checkpoint.expected(form, tokens) for _, tokens, _ in rows]
    assert_near(errors_of([logits for _, _, logits in rows], want), FORMS[form].bound, checkpoint.case)


def test_unequal_and_idle_rows_are_those_of_native_layers(
    checkpoint: Checkpoint, plugged: Callable[[str], Path], native: Path
) -> None:
    with (
        open_engine(load_bundle(plugged("fp16")), allow_bundle_code=True) as ours,
        open_engine(load_bundle(native)) as theirs,
    ):
        found, want = ([logits for _, _, logits in rows_of(engine)] for engine in (ours, theirs))
    assert_near(errors_of(found, want), FORMS["fp16"].bound, checkpoint.case)


# An int8 cache against one of fp16: each key and value is off by up to 1/254 of a head's largest element.
@pytest.mark.parametrize(("form", "bound"), [("fp16", FORMS["fp16"].bound), ("int8 cache", 2e-1)])
def test_greedy_tokens_are_those_of_native_layers(
    checkpoint: Checkpoint, plugged: Callable[[str], Path], native: Path, form: str, bound: float
) -> None:
    with (
        open_engine(load_bundle(plugged(form)), allow_bundle_code=True) as ours,
        open_engine(load_bundle(native)) as theirs,
    ):
        for count in PROMPTS:
            prompt = prompt_of(count, seed=count)
            want, want_logits = greedy(theirs, prompt)
            found, found_logits = greedy(ours, prompt, forced=want)
            errors = errors_of(list(found_logits), list(want_logits))
            assert_near(errors, bound, checkpoint.case)
            second, first = np.sort(want_logits, axis=-1)[:, -2:].T
            is_clear = (first - second > 2 * bound) & (errors <= bound)  # else both may be right
            assert is_clear.any()
            np.testing.assert_array_equal(np.array(found)[is_clear], np.array(want)[is_clear])


def test_a_replayed_graph_equals_plain_steps(plugged: Callable[[str], Path]) -> None:
    """Nothing that enqueue does hinders a capture, and what was captured follows lengths that grow."""
    prompt, results = prompt_of(60, seed=3), []
    for use_graphs in (True, False):
        with TensorRtEngine(load_bundle(plugged("fp16"))) as engine:
            assert engine._decode is not None
            graphs = engine._decode._graphs
            assert graphs is not None
            if not use_graphs:
                engine._decode._graphs = None
            results.append(greedy(engine, prompt)[1])
            assert graphs._is_on and len(graphs) == int(use_graphs)
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)  # the same kernels


def test_closing_gives_the_memory_back(plugged: Callable[[str], Path]) -> None:
    """Kernels that plugins loaded too: they go with the last plugin of a context."""
    cuda, free = load_cuda(), []
    for _ in range(6):
        with open_engine(load_bundle(plugged("fp16")), allow_bundle_code=True) as engine:
            greedy(engine, prompt_of(20))
        free.append(cuda.call("cudaMemGetInfo")[0])
    assert max(free[1:]) - min(free[1:]) < 4 << 20  # the first one loads libraries


def test_a_version_compatible_engine_brings_its_own_library(
    checkpoint: Checkpoint, library: Path, tmp_path: Path
) -> None:
    options = (*FORMS["fp16"].options, "--version-compatible")
    bundle = load_bundle(build(checkpoint.path, tmp_path / "bundle", library, *options))
    facts = bundle.manifest.engines.text.tensorrt
    assert facts is not None and facts.plugins is not None and facts.plugins.in_engine
    (bundle.path / facts.plugins.file).unlink()
    tokens = prompt_of(40)
    with open_engine(bundle) as engine:
        errors = errors_of([engine.prefill(0, ids(*tokens))], [checkpoint.expected("fp16", tokens)])
    assert_near(errors, FORMS["fp16"].bound, checkpoint.case)
