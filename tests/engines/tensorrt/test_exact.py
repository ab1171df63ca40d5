"""The very file that TensorRT's parser is given, run by ONNX Runtime on the CPU, against transformers.

tests/exporter/lowering/tensorrt/test_standard.py has each precision of the lowering alone; this goes through a
whole build.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from tests.checkpoints import reference_logits, save_tiny
from tests.engines.tensorrt.builder_double import make_module
from tests.exporter.cases import CASES
from tests.exporter.rounded import rounded_model
from tests.exporter.stepper import Stepper

CONTEXT, CHUNK, CAPACITY = 192, 64, 256
# Logits have a standard deviation of 1. Against the same rounded weights: activations of 11 bits. Against the
# checkpoint's own weights, which are random: rounding them hurts more than it does trained ones.
SAME_WEIGHTS_BOUND = 2e-2
ROUNDING_BOUNDS = {"fp16": 2e-2, "int8": 0.4, "int4": 4.0}

Handed = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Case -> (checkpoint folder, transformers model), each made once."""
    root = tmp_path_factory.mktemp("exact")

    @functools.cache
    def make(case: str) -> tuple[Path, Any]:
        return root / case, save_tiny(root / case, **CASES[case])

    return make


@pytest.fixture
def handed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Handed:
    """Builds a checkpoint at a precision with the double; gives the file that its parser was given."""
    module: ModuleType = make_module()
    parse = module.OnnxParser.parse_from_file

    def kept(self: Any, path: str) -> bool:
        shutil.copytree(Path(path).parent, tmp_path / "handed", ignore=shutil.ignore_patterns("*.json", "*.plan"))
        return bool(parse(self, path))

    monkeypatch.setattr(module.OnnxParser, "parse_from_file", kept)
    monkeypatch.setitem(sys.modules, "tensorrt", module)

    def build(checkpoint: Path, precision: str) -> Path:
        spec = BuildSpec(
            target="tensorrt",  # type: ignore[arg-type]  # BuildSpec takes names
            precision=precision,  # type: ignore[arg-type]
            max_context=CONTEXT,
            prefill_chunk=CHUNK,
            tensorrt=TensorRtOptions(attention="native", moe="native"),
        )
        build_bundle(checkpoint, spec, tmp_path / "bundle")
        return tmp_path / "handed" / "model.onnx"

    return build


# Every configuration has its own test of the lowering; a build adds the fixed capacity and the file.
RUN = [(case, "fp16") for case in ("gqa", "tied", "moe", "moe_mixed")] + [("gqa", "int8"), ("tied", "int4")]


@pytest.mark.parametrize(("case", "precision"), RUN)
def test_what_the_parser_reads_gives_transformers_logits(
    case: str, precision: str, models: Callable[[str], tuple[Path, Any]], handed: Handed
) -> None:
    checkpoint, model = models(case)
    # Not 1, at which a router of moe_mixed has two experts within 11 bits of each other: either choice is right.
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, 17).tolist()
    stepper = Stepper(handed(checkpoint, precision), rows=1, capacity=CAPACITY)
    got = np.stack([stepper.step([ids[:9]])[0]] + [stepper.step([[token]])[0] for token in ids[9:]])
    same, own = (reference_logits(m, [ids])[0, 8:].numpy() for m in (rounded_model(model, precision), model))
    np.testing.assert_allclose(got, same, atol=SAME_WEIGHTS_BOUND, rtol=0)
    np.testing.assert_allclose(got, own, atol=ROUNDING_BOUNDS[precision], rtol=0)
