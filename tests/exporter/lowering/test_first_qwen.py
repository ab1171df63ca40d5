"""First-generation Qwen in every lowering: log-n scaling and dynamic NTK, each row by the alpha of its first step."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.ort import contrib
from qwen_aot.exporter.lowering.ort.provider import Provider
from tests.exporter.lowering.lowerings import LOWERINGS, export
from tests.exporter.stepper import Stepper
from tests.first_qwen import CONFIG, POSITIONS, SEQ_LENGTH, VOCAB, Statement, make_weights, save_folder

BOUND = 1e-3  # fp32 against float64; logits reach 8; seen: under 4e-5
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "qwen.json").read_text())
INPUT = f"rotary_offset.{SEQ_LENGTH}"
FIRST_STEPS = {1: 0, SEQ_LENGTH: 0, SEQ_LENGTH + 1: 1, 2 * SEQ_LENGTH: 1, 2 * SEQ_LENGTH + 1: 2, 90: 2}  # -> table


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("first_qwen")
    checkpoint = save_folder(root / "checkpoint")
    return functools.cache(lambda lowering: export(checkpoint, root / lowering, lowering))


@functools.cache
def statement() -> Statement:
    return Statement(make_weights())


def ids(count: int, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, atol=BOUND, rtol=0)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"prompt {case['prompt']}")
def test_the_statement_is_modelscopes_model(case):
    """The golden numbers are float32 and have five decimals."""
    logits = statement().logits(case["ids"], case["prompt"])[case["prompt"] - 1 :]
    assert statement().alpha(case["prompt"]) == case["alpha"]
    shown = len(case["logits"][0])
    np.testing.assert_allclose(logits[:, :shown], case["logits"], atol=1e-4)
    np.testing.assert_allclose(logits.sum(axis=1), case["sums"], atol=2e-3)


def test_the_golden_cases_can_tell_alphas_apart():
    case = next(case for case in GOLDEN["cases"] if case["prompt"] == SEQ_LENGTH + 1)
    others = statement().logits(case["ids"], SEQ_LENGTH)[case["prompt"] - 1 :]
    assert np.abs(others[:, : len(case["logits"][0])] - case["logits"]).max() > 1


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_rows_of_different_alphas_in_one_batch(lowering, exported):
    """Each in chunks that know nothing of the prompt's length, then a token a step."""
    stepper = Stepper(exported(lowering), rows=len(FIRST_STEPS), capacity=POSITIONS)
    assert INPUT in stepper.names
    stepper.rotary_offsets = POSITIONS * np.array(list(FIRST_STEPS.values()))
    texts = [ids(first + 24, first) for first in FIRST_STEPS]
    wanted = [statement().logits(text, first) for text, first in zip(texts, FIRST_STEPS, strict=True)]
    places = [0] * len(texts)
    for _ in range(4):
        pieces: list[Sequence[int]] = [
            text[place : min(place + 30, first)] for text, place, first in zip(texts, places, FIRST_STEPS, strict=True)
        ]
        if not any(pieces):
            break
        logits = stepper.step(pieces)
        for row, piece in enumerate(pieces):
            places[row] += len(piece)
            if piece:
                close(logits[row], wanted[row][places[row] - 1])
    assert places == list(FIRST_STEPS)
    for step in range(24):
        logits = stepper.step([[text[place + step]] for text, place in zip(texts, places, strict=True)])
        for row in range(len(texts)):
            close(logits[row], wanted[row][places[row] + step])


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_greedy_texts_on_both_sides_of_the_trained_length(lowering, exported):
    for first in (20, SEQ_LENGTH + 1):
        stepper = Stepper(exported(lowering), rows=1, capacity=POSITIONS)
        stepper.rotary_offsets[:] = POSITIONS * FIRST_STEPS.get(first, 0)
        assert stepper.greedy(ids(first), 64) == statement().greedy(ids(first), 64)


def test_the_wrong_table_is_noticed(exported):
    stepper = Stepper(exported("ort"), rows=1, capacity=POSITIONS)
    found = stepper.step([ids(SEQ_LENGTH + 1)])[0]  # of the first table
    assert np.abs(found - statement().logits(ids(SEQ_LENGTH + 1))[-1]).max() > 1


@pytest.mark.parametrize("use_dynamic_ntk", [False, True])
@pytest.mark.parametrize("use_logn_attn", [False, True])
def test_each_formula_alone(use_dynamic_ntk, use_logn_attn, tmp_path):
    config = {**CONFIG, "use_dynamic_ntk": use_dynamic_ntk, "use_logn_attn": use_logn_attn}
    path = export(save_folder(tmp_path / "checkpoint", config=config), tmp_path / "ort", "ort")
    stepper = Stepper(path, rows=1, capacity=POSITIONS)
    assert (INPUT in stepper.names) == use_dynamic_ntk
    assert ("model.query_scales" in _initializers(path)) == use_logn_attn
    stepper.rotary_offsets[:] = POSITIONS
    text = ids(50)
    close(stepper.step([text])[0], Statement(make_weights(), config).logits(text)[-1])


def test_a_context_of_the_trained_length_has_neither(tmp_path):
    with open_checkpoint(save_folder(tmp_path)) as checkpoint:
        traced = trace(checkpoint.config, context=SEQ_LENGTH, positions=POSITIONS)
    assert [value.name for value in traced.model.graph.inputs if "rotary" in str(value.name)] == []
    assert "model.query_scales" not in traced.recipes
    assert traced.recipes["model.rotary.cos"].outputs[0].shape[0] == POSITIONS


def test_what_kernels_for_gpus_cannot_be_shown_to_do_is_refused(tmp_path):
    with open_checkpoint(save_folder(tmp_path)) as checkpoint:
        traced = trace(checkpoint.config, ir.DataType.FLOAT16)
        with pytest.raises(ExportError, match=f"accepted: --max-context up to {SEQ_LENGTH}"):
            contrib.lower(traced, contrib.OrtOptions(provider=Provider.CUDA))
        within = trace(checkpoint.config, ir.DataType.FLOAT16, context=SEQ_LENGTH)
        contrib.lower(within, contrib.OrtOptions(provider=Provider.CUDA))


def _initializers(path: Path) -> set[str]:
    return set(ir.load(path).graph.initializers)
