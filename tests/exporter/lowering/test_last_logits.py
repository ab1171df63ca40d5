"""The logits of each row's last tokens, in every lowering, against transformers in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.quantize.blockwise import BlockFormat
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.cases import CASES
from tests.exporter.graph.test_trace import DENSE
from tests.exporter.lowering.lowerings import LOWERINGS, export
from tests.exporter.stepper import Stepper

FP32_BOUND = 1e-3  # as in test_lowerings

Exported = Callable[[str, str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """(case, lowering) -> (transformers model, path of model.onnx), each made once."""
    root = tmp_path_factory.mktemp("last_logits")

    @functools.cache
    def make(case: str, lowering: str) -> tuple[Any, Path]:
        folder = root / f"{case}-{lowering}"
        model = save_tiny(folder / "checkpoint", **CASES[case])
        return model, export(folder / "checkpoint", folder / lowering, lowering, speculates=True)

    return make


def random_ids(model: Any, count: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, model.config.vocab_size, count)]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("case", ["gqa", "moe", "tied"])
def test_of_rows_with_many_few_and_no_tokens(case: str, lowering: str, exported: Exported) -> None:
    """Of a row with fewer tokens than are told, its own are the last; what stands before them means nothing."""
    model, onnx_file = exported(case, lowering)
    texts = [random_ids(model, 20, seed) for seed in (1, 2, 3)]
    stepper = Stepper(onnx_file, rows=3, capacity=48)
    stepper.step([texts[0][:6], texts[1][:2], texts[2][:9]])
    held = [6, 2, 9]
    for counts, told, pad in (((4, 1, 2), 4, 0), ((3, 0, 1), 3, 0), ((1, 3, 2), 2, 1), ((1, 1, 1), 1, 0)):
        new = [text[start : start + count] for text, start, count in zip(texts, held, counts, strict=True)]
        logits = stepper.step_last(new, told, pad)
        assert logits.shape[:2] == (3, told)
        for row, count in enumerate(counts):
            held[row] += count
            expected = reference_logits(model, [texts[row][: held[row]]])[0].numpy()
            mine = min(count, told)
            if mine:
                np.testing.assert_allclose(logits[row, told - mine :], expected[-mine:], atol=FP32_BOUND, rtol=0)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_last_token_alone_is_as_without(lowering: str, exported: Exported, tmp_path: Path) -> None:
    """A bundle that can check drafts decodes as one that can't, to the bit: it computes one row of the head."""
    model, onnx_file = exported("gqa", lowering)
    save_tiny(tmp_path / "checkpoint", **CASES["gqa"])
    plain = Stepper(export(tmp_path / "checkpoint", tmp_path / "plain", lowering), rows=2, capacity=32)
    stepper = Stepper(onnx_file, rows=2, capacity=32)
    for new in ([random_ids(model, 7, 1), random_ids(model, 3, 2)], [[5], [6]], [[], [7]]):
        np.testing.assert_array_equal(stepper.step(new), plain.step(new))


def test_what_is_not_asked_for_is_not_there(tmp_path: Path) -> None:
    save_tiny(tmp_path / "checkpoint", **CASES["gqa"])
    graph = onnx.load(export(tmp_path / "checkpoint", tmp_path / "plain", "ort"), load_external_data=False).graph
    names = {value.name for value in (*graph.input, *graph.output)}
    assert not names & {"logits_positions", "last_logits"}


def test_fast_prefill_leaves_them_their_blocks() -> None:
    """The second form is of long steps; the last layer's MLP and the head see few tokens in any."""
    counts = []
    for speculates in (False, True):
        options = OrtOptions(BlockFormat(4, 16), fast_prefill=True)
        traced = ort.lower(trace(DENSE, positions=64, speculates=speculates), options)
        choice = next(node for node in traced.model.graph if node.op_type == "If")
        branch = choice.attributes["then_branch"].as_graph()
        counts.append(
            [sum(node.op_type == kind for node in branch) for kind in ("MatMulIntegerToFloat", "MatMulNBits")]
        )
    assert counts[0] == counts[1]
    assert all(counts[0])
