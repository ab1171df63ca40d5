"""Rows with rotary tables of their own, over every backend: the checksum toy counts where a row's table begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_aot.errors import EngineMismatchError
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from tests.runtime.backends.tensorrt.engines import FLAVOURS, opened, write_checksum_bundle
from tests.runtime.toys import (
    ALL_INPUTS,
    VOCAB_SIZE,
    checksum,
    checksum_model,
    io_tables,
    make_manifest,
    with_text_engine,
    write_bundle,
)

LENGTH = 20
NAMES = (*ALL_INPUTS, f"rotary_offset.{LENGTH}")
CAPACITY, ROWS = 1024, 4


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 200, count).tolist()


def wanted(token_ids: list[int], first_step: int) -> int:
    """The next token of a row whose first step had so many tokens."""
    table = 0
    while first_step > LENGTH * 2**table:
        table += 1
    return checksum(token_ids, table * CAPACITY)


def ids(token_ids: list[int]) -> np.ndarray:
    return np.array(token_ids, np.int64)


@pytest.fixture(params=["onnxruntime", *FLAVOURS])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param != "onnxruntime":
        with opened(write_checksum_bundle(tmp_path / "bundle", request.param, names=NAMES)) as (made, _):
            yield made
        return
    inputs, outputs = io_tables(NAMES, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    path = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    with OnnxRuntimeEngine(load_bundle(path), OrtOptions(threads=1)) as made:
        yield made


@pytest.mark.parametrize("first", [1, LENGTH, LENGTH + 1, 2 * LENGTH, 2 * LENGTH + 1, 300])
def test_a_prompts_length_chooses_its_table(engine: Any, first: int) -> None:
    """In chunks of 8 tokens, and then a step at a time."""
    sequence = text(first + 30)
    assert engine.prefill(2, ids(sequence[:first])).argmax() == wanted(sequence[:first], first)
    for end in range(first + 1, first + 31):
        assert engine.decode(2, ids(sequence[end - 1 : end]))[0].argmax() == wanted(sequence[:end], first)


def test_a_part_of_a_prompt_is_told_of_the_rest(engine: Any) -> None:
    sequence = text(30)
    engine.prefill(0, ids(sequence[:5]), prompt_tokens=30)
    assert engine.prefill(0, ids(sequence[5:]), prompt_tokens=25).argmax() == wanted(sequence, 30)


def test_rows_keep_theirs_through_steps_of_others(engine: Any) -> None:
    rows = [text(5, 1), text(25, 2), text(50, 3), text(90, 4)]
    firsts = [len(row) for row in rows]
    for row, held in enumerate(rows):
        engine.prefill(row, ids(held))
    for step in range(12):  # of one shape, so that TensorRT's are captured
        fed = [-1 if row == step % 5 else 7 + row for row in range(ROWS)]
        logits = engine.decode(0, ids(fed))
        for row, token_id in enumerate(fed):
            if token_id >= 0:
                rows[row].append(token_id)
                assert logits[row].argmax() == wanted(rows[row], firsts[row])


def test_what_is_left_of_a_row_keeps_its_table_and_an_empty_row_has_none(engine: Any) -> None:
    sequence = text(60)
    engine.prefill(1, ids(sequence[:50]))
    engine.truncate(1, 3)
    assert engine.prefill(1, ids(sequence[3:10]), prompt_tokens=10).argmax() == wanted(sequence[:10], 50)
    engine.truncate(1, 0)
    assert engine.decode(0, ids([-1, sequence[0]]))[1].argmax() == wanted(sequence[:1], 1)
    assert engine.prefill(1, ids(sequence[1:])).argmax() == wanted(sequence, 1)


def test_a_copy_has_its_sources_table(engine: Any) -> None:
    sequence = text(60)
    engine.prefill(3, ids(sequence[:45]))
    engine.prefill(0, ids(sequence[:4]))
    engine.copy_row(3, 0, 30)
    assert engine.prefill(0, ids(sequence[30:])).argmax() == wanted(sequence, 45)
    engine.copy_row(3, 0, 0)
    assert engine.prefill(0, ids(sequence[:4])).argmax() == wanted(sequence[:4], 4)


def any_mix_of_calls(engine: Any, data: st.DataObject) -> None:
    """Calls in any order, on rows that are empty."""
    rows: list[list[int]] = [[] for _ in range(ROWS)]
    firsts = [0] * ROWS
    tokens = st.integers(1, VOCAB_SIZE - 10)
    for row in range(ROWS):
        engine.truncate(row, 0)
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["prefill", "decode", "truncate", "copy"]))
        row = data.draw(st.integers(0, ROWS - 1))
        if action == "prefill":
            new = data.draw(st.lists(tokens, min_size=1, max_size=60))
            prompt = len(new) + data.draw(st.integers(0, 60))
            firsts[row] = firsts[row] if rows[row] else prompt
            rows[row] += new
            assert engine.prefill(row, ids(new), prompt_tokens=prompt).argmax() == wanted(rows[row], firsts[row])
        elif action == "truncate":
            length = data.draw(st.integers(0, len(rows[row])))
            engine.truncate(row, length)
            del rows[row][length:]
        elif action == "copy":
            target = (row + data.draw(st.integers(1, ROWS - 1))) % ROWS
            length = data.draw(st.integers(0, len(rows[row])))
            engine.copy_row(row, target, length)
            rows[target], firsts[target] = rows[row][:length], firsts[row]
        else:
            fed = data.draw(st.lists(tokens | st.just(-1), min_size=ROWS, max_size=ROWS))
            logits = engine.decode(0, ids(fed))
            for each, token_id in enumerate(fed):
                if token_id >= 0:
                    firsts[each] = firsts[each] if rows[each] else 1
                    rows[each].append(token_id)
                    assert logits[each].argmax() == wanted(rows[each], firsts[each])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_of_calls(engine: Any, data: st.DataObject) -> None:
    any_mix_of_calls(engine, data)


def test_an_offset_of_another_type_is_refused(tmp_path: Path) -> None:
    inputs, outputs = io_tables(NAMES, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    path = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    bundle = load_bundle(path)
    changed = tuple(
        type(tensor)(tensor.name, "int32", tensor.shape) if tensor.name.startswith("rotary_offset.") else tensor
        for tensor in inputs
    )
    object.__setattr__(bundle, "manifest", with_text_engine(bundle.manifest, inputs=changed))
    with pytest.raises(EngineMismatchError, match=r"rotary_offset\.20.*"):
        OnnxRuntimeEngine(bundle, OrtOptions(threads=1))
