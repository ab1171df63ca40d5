"""Whole bundles by own kernels, from prompt to answer: against transformers, row by row, and beside ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.runtime.backends.cpu.kernels import kernels_of
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine
from qwen_aot.runtime.generation.generator import Generator
from tests.checkpoints import MIN_TOKENIZER_VOCAB, save_tiny
from tests.cpu_kernels import named_kernels
from tests.shared import once

TOKENS, ROWS = 64, 6
CONFIG: dict[str, Any] = {"heads": 6, "kv_heads": 2, "hidden": 96, "vocab": 131}
EXPERTS: dict[str, Any] = {"moe": {"num_experts": 6, "num_experts_per_tok": 2}}
BUILDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4-int8-cache": {"precision": "int4", "kv_precision": "int8"},
    "int4-odd-heads": {"precision": "int4"},
    "int4-speculates": {"precision": "int4", "speculate": 4},
    "int8-experts": {"precision": "int8"},
    "int4-experts": {"precision": "int4"},
}
# Beside CONFIG: scales of a cache are found by texts, and ONNX Runtime has no attention for a head size of 24.
MODELS: dict[str, dict[str, Any]] = {
    "int4-int8-cache": {"with_tokenizer": True, "vocab": MIN_TOKENIZER_VOCAB},
    "int4-odd-heads": {"head_dim": 24},
}


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> Iterator[None]:
    with named_kernels():
        yield


@pytest.fixture(scope="module")
def bundle(shared_folder: Path) -> Callable[[str], Path]:
    def make(folder: Path, name: str) -> Path:
        experts = EXPERTS if name.endswith("-experts") else {}
        save_tiny(folder / "model", **(CONFIG | experts | MODELS.get(name, {})))
        spec = BuildSpec(max_context=256, max_batch=ROWS, prefill_chunk=32, **BUILDS[name])
        return build_bundle(folder / "model", spec, folder / "bundle").out

    return lambda name: once(shared_folder / "own-kernels" / name, lambda folder: make(folder, name))


def prompts(count: int) -> list[list[int]]:
    """Of different lengths, below and above a chunk."""
    return [np.random.default_rng(n).integers(0, CONFIG["vocab"], 3 + 11 * n).tolist() for n in range(count)]


def answers(bundle: Path, texts: list[list[int]], kernels: str, **options: Any) -> list[tuple[int, ...]]:
    with Generator.open(bundle, threads=1, kernels=kernels, **options) as generator:
        assert kernels_of(generator.engine.manifest) == kernels
        config = generator.defaults.resolve(temperature=0, max_new_tokens=TOKENS, ignore_eos=True)
        return [answer.token_ids for answer in generator.generate(texts, config)]


def test_greedy_answers_of_fp32_are_transformers(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    model = save_tiny(tmp_path, **CONFIG)
    for prompt, found in zip(prompts(3), answers(bundle("fp32"), prompts(3), "own"), strict=True):
        with torch.no_grad():
            wanted = model.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert list(found) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("fp32", ROWS),
        ("int8", ROWS),
        ("int4", ROWS),
        ("int8-experts", ROWS),
        ("int4-experts", ROWS),
        ("int4-int8-cache", ROWS),
        ("int4-odd-heads", 4),
    ],
)
def test_answers_beside_others_are_those_alone(name: str, rows: int, bundle: Callable[[str], Path]) -> None:
    """Six rows of unequal lengths in one step, which long steps' kernels run, and one, which a single token's do.

    With heads of 24 the second of six rows comes to two tokens that are as good as equal (2.715 and 2.717), and steps
    of more than four tokens add in another order (docs/cpu-kernels.md): four rows run what one does.
    """
    texts = prompts(rows)
    together = answers(bundle(name), texts, "own")
    assert together == [answers(bundle(name), [text], "own")[0] for text in texts]


@pytest.mark.parametrize("name", ["int8", "int4", "int4-int8-cache", "int4-odd-heads", "int8-experts", "int4-experts"])
def test_logits_are_near_those_of_onnxruntimes_kernels(name: str, bundle: Callable[[str], Path]) -> None:
    """As near as rounding of inputs leaves them (tests/exporter/lowering/ort/test_kernels.py): logits have std 1."""
    prompt = np.array(prompts(5)[4], np.int64)
    found = {}
    for kernels in ("own", "onnxruntime"):
        with Generator.open(bundle(name), threads=2, kernels=kernels) as generator:
            found[kernels] = generator.engine.prefill(0, prompt).copy()
    assert np.sqrt(np.square(found["own"] - found["onnxruntime"]).mean()) < 0.1


@pytest.mark.parametrize(("name", "ratio"), [("int4", 2), ("int4-odd-heads", 2), ("int4-int8-cache", 1)])
def test_the_cache_takes_half_the_memory_or_that_of_its_codes(
    name: str, ratio: int, bundle: Callable[[str], Path]
) -> None:
    sizes = {}
    for kernels in ("own", "onnxruntime"):
        with Generator.open(bundle(name), threads=1, kernels=kernels) as generator:
            assert isinstance(generator.engine, OnnxRuntimeEngine)
            sizes[kernels] = generator.engine.cache.nbytes
    assert sizes["onnxruntime"] == ratio * sizes["own"]


def test_drafts_change_no_answer(bundle: Callable[[str], Path]) -> None:
    text = [7, 8, 9, 10] * 8
    drafted = answers(bundle("int4-speculates"), [text], "own")
    assert drafted == answers(bundle("int4-speculates"), [text], "own", speculate=False)
    assert drafted == answers(bundle("int4"), [text], "own")
