"""Steps that check drafted tokens over TensorRT, on strict doubles: a profile of their own, memory that is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_aot.errors import GenerationError
from tests.checkpoints import reference_logits, save_tiny
from tests.doubles.bundles import export_tensorrt_bundle
from tests.runtime.backends.tensorrt.engines import FLAVOURS, ids, opened, write_checksum_bundle
from tests.runtime.toys import ALL_INPUTS, checksum

MOST = 4


@pytest.fixture(scope="module", params=FLAVOURS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = (*ALL_INPUTS, "logits_positions")
    return write_checksum_bundle(
        tmp_path_factory.mktemp("b") / "checksum", request.param, names=names, logits_rows=MOST
    )


@settings(max_examples=15)
@given(
    steps=st.lists(
        st.lists(st.lists(st.integers(0, 210), max_size=MOST), min_size=4, max_size=4), min_size=1, max_size=6
    )
)
def test_every_row_of_logits_and_what_rows_hold(bundle: Path, steps: list[list[list[int]]]) -> None:
    rows: list[list[int]] = [[row + 1] for row in range(4)]
    with opened(bundle) as (engine, _):
        for row, held in enumerate(rows):
            engine.prefill(row, ids(*held))
        for texts in steps:
            width = max(2, *map(len, texts))
            logits = engine.verify(0, np.array([[*text, *[-1] * (width - len(text))] for text in texts]))
            for row, text in enumerate(texts):
                for place, token_id in enumerate(text):
                    rows[row].append(token_id)
                    assert logits[row, place - len(text)].argmax() == checksum(rows[row])
                if len(text) > 1:  # as if the last one had been wrong
                    engine.truncate(row, len(rows[row]) - 1)
                    rows[row].pop()
            step = [token_id % 211 for token_id in range(5, 9)]
            logits = engine.decode(0, ids(*step))
            for row, token_id in enumerate(step):
                rows[row].append(token_id)
                assert logits[row].argmax() == checksum(rows[row])


def test_decode_steps_alone_are_captured(tmp_path: Path) -> None:
    """Drafts differ in length from step to step: each length would be a graph."""
    path = write_checksum_bundle(
        tmp_path / "bundle", "tensorrt", names=(*ALL_INPUTS, "logits_positions"), logits_rows=MOST
    )
    with opened(path) as (engine, gpu):
        engine.prefill(0, ids(1))
        for _ in range(4):
            engine.verify(0, ids(2, 3)[None])
        assert gpu.calls["cudaStreamBeginCapture"] == 0
        for _ in range(4):
            engine.decode(0, ids(2))
        assert gpu.calls["cudaStreamBeginCapture"] == 1
        assert gpu.calls["cudaGraphLaunch"] > 0


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_real_graph_equals_transformers(flavour: str, tmp_path: Path) -> None:
    reference = save_tiny(tmp_path / "checkpoint", kv_heads=2)
    bundle = export_tensorrt_bundle(tmp_path / "checkpoint", tmp_path / "bundle", flavour, logits_rows=MOST)
    texts = [list(range(1, 24)), list(range(40, 50))]
    with opened(bundle) as (engine, _):
        for row, text in enumerate(texts):
            engine.prefill(row, ids(*text[:-MOST]))
        logits = engine.verify(0, np.array([text[-MOST:] for text in texts]))
        for row, text in enumerate(texts):
            # As in test_engine: rounding of a few layers' sums; logits have a standard deviation of 1.
            np.testing.assert_allclose(logits[row], reference_logits(reference, [text])[0, -MOST:], atol=1e-4)
        engine.truncate(0, len(texts[0]) - 2)
        again = engine.decode(0, ids(texts[0][-2]))
        np.testing.assert_allclose(again[0], reference_logits(reference, [texts[0][:-1]])[0, -1], atol=1e-4)


def test_a_bundle_without_them(tmp_path: Path) -> None:
    with (
        opened(write_checksum_bundle(tmp_path / "bundle")) as (engine, _),
        pytest.raises(GenerationError, match="rebuild it with --speculate"),
    ):
        engine.verify(0, ids(1, 2)[None])
