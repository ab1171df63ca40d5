"""What every backend of the C library does alike, over the checksum model in place of a library.

The cases that the Python engine is put to, and what only this one has: interruption, and steps that are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_aot.errors import ContextFullError, GenerationError
from qwen_aot.runtime.bundle.manifest import IoTensor
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from tests.runtime.backends.ort import test_engine as cases
from tests.runtime.capi.engines import NO_TYPES, CancelledError, Dialog, NativeEngine, tensors
from tests.runtime.capi.native import Native
from tests.runtime.toys import VOCAB_SIZE, checksum

TENSORS = tuple(IoTensor(f"past_key_values.0.{part}", "float32", ("B", 2, "C")) for part in ("key", "value"))
ROWS, CONTEXT, CHUNK = 4, 1000, 8
POISON = 13


@pytest.fixture(scope="module")
def dialog(native: Native) -> Iterator[Dialog]:
    with Dialog(native.program("rows", flags=NO_TYPES)) as dialog:
        yield dialog


def open_rows(dialog: Dialog, *, is_lazy: bool) -> NativeEngine:
    facts = {"max_batch": ROWS, "max_context": CONTEXT, "prefill_chunk": CHUNK, "vocab_size": VOCAB_SIZE}
    dialog.want("open", is_lazy=is_lazy, inputs=tensors(TENSORS), **facts)
    return NativeEngine(dialog, ROWS, VOCAB_SIZE)


@pytest.fixture(params=[True, False], ids=["lazy", "growing"])
def engine(request: pytest.FixtureRequest, dialog: Dialog) -> NativeEngine:
    return open_rows(dialog, is_lazy=request.param)


def plan(dialog: Dialog, *, poison: int = -1, steps: int = -1, memory_calls: int = -1) -> None:
    dialog.want("plan", poison=poison, steps_until_failure=steps, memory_calls_until_failure=memory_calls)


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int64)


@pytest.mark.parametrize(
    "case",
    [
        cases.test_prefill_and_decode_continue_one_sequence,
        cases.test_rows_of_unequal_length_decode_together,
        cases.test_a_range_of_rows_leaves_the_others_alone,
        cases.test_truncate_forgets_the_end,
        cases.test_a_full_context_is_refused_and_nothing_is_written,
        cases.test_unknown_ids_and_empty_prompts_are_refused,
        cases.test_rows_that_do_not_exist_are_refused,
        *(lambda engine, cut=cut: cases.test_prefill_in_every_split_is_the_same(engine, cut) for cut in (1, 8, 9, 19)),
        *(lambda engine, held=held: cases.test_idle_rows_do_not_move(engine, held) for held in (0, 3)),
    ],
)
def test_the_cases_of_the_python_engine(engine: NativeEngine, case: Callable[[Any], None]) -> None:
    case(engine)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), is_lazy=st.booleans())
def test_any_mix_of_calls_and_failures(dialog: Dialog, data: st.DataObject, is_lazy: bool) -> None:
    """Lists of ids are the reference; what fails leaves every row as it was, but for a copy's target."""
    engine = open_rows(dialog, is_lazy=is_lazy)
    plan(dialog, poison=POISON)
    rows: list[list[int]] = [[] for _ in range(ROWS)]
    tokens = st.integers(0, VOCAB_SIZE - 1) | st.just(POISON)
    for _ in range(data.draw(st.integers(1, 10))):
        action = data.draw(st.sampled_from(["prefill", "decode", "truncate", "copy", "fail"]))
        row = data.draw(st.integers(0, ROWS - 1))
        if action == "prefill":
            new = data.draw(st.lists(tokens, min_size=1, max_size=30) | st.just([7] * 300))
            if len(rows[row]) + len(new) > CONTEXT:
                with pytest.raises(ContextFullError):
                    engine.prefill(row, ids(*new))
            elif POISON in new:
                with pytest.raises(NonFiniteLogitsError, match=f"logits of row {row} hold"):
                    engine.prefill(row, ids(*new))
            else:
                rows[row] += new
                assert engine.prefill(row, ids(*new)).argmax() == checksum(rows[row])
        elif action == "fail":
            plan(dialog, poison=POISON, steps=data.draw(st.integers(0, 3)))
            with pytest.raises(GenerationError, match=r"the library failed|context|hold NaN"):
                engine.prefill(row, ids(*[5] * 40))
                engine.prefill(row, ids(POISON))
            plan(dialog, poison=POISON)
            dialog.want("steps")
            engine.truncate(row, len(rows[row]))
        elif action == "truncate":
            length = data.draw(st.integers(0, len(rows[row])))
            engine.truncate(row, length)
            del rows[row][length:]
        elif action == "copy":
            target = data.draw(st.integers(0, ROWS - 1).filter(lambda other, row=row: other != row))  # type: ignore[misc]
            length = data.draw(st.integers(0, len(rows[row])))
            engine.copy_row(row, target, length)
            rows[target] = rows[row][:length]
        else:
            step = data.draw(st.lists(st.just(-1) | tokens, min_size=1, max_size=ROWS - row))
            if POISON in step:
                with pytest.raises(NonFiniteLogitsError) as caught:
                    engine.decode(row, ids(*step))
                assert caught.value.rows == tuple(row + i for i, token_id in enumerate(step) if token_id == POISON)
            else:
                logits = engine.decode(row, ids(*step))
                for offset, token_id in enumerate(step):
                    if token_id >= 0:
                        rows[row + offset].append(token_id)
                        assert logits[offset].argmax() == checksum(rows[row + offset])
        assert engine.cache_length.tolist() == [len(sequence) for sequence in rows]
        assert dialog.want("unfinished")["count"] == 0  # a NaN that stayed would meet later steps


def test_what_steps_are_given(dialog: Dialog) -> None:
    engine = open_rows(dialog, is_lazy=True)
    engine.prefill(1, ids(*range(10)))
    engine.decode(0, ids(4, -1, -1))
    # Prompts in chunks, never padded; an idle row that holds something counts no token, an empty one one of scratch.
    assert dialog.want("steps")["steps"] == [
        [1, list(range(8)), [8]],
        [1, [8, 9], [2]],
        [0, [4, -1, -1], [1, 0, 1]],
    ]


def test_a_step_that_fails_is_scrubbed_and_may_be_repeated(dialog: Dialog) -> None:
    engine = open_rows(dialog, is_lazy=False)
    engine.prefill(0, ids(1))
    engine.prefill(1, ids(2))
    plan(dialog, poison=POISON)
    with pytest.raises(NonFiniteLogitsError, match=r"logits of row 1, 2 hold NaN or Inf: .*--precision fp32") as caught:
        engine.decode(0, ids(3, POISON, POISON, -1))
    assert caught.value.rows == (1, 2)
    assert dialog.want("unfinished")["count"] == 0
    assert engine.decode(0, ids(3, -1, -1, -1))[0].argmax() == checksum([1, 3])
    plan(dialog, poison=POISON, steps=0)
    with pytest.raises(GenerationError, match="the library failed"):
        engine.decode(0, ids(POISON, POISON))
    plan(dialog)
    assert dialog.want("unfinished")["count"] == 0
    assert engine.cache_length.tolist() == [2, 1, 0, 0]


def test_a_cache_that_can_not_be_scrubbed_is_not_used_again(dialog: Dialog) -> None:
    engine = open_rows(dialog, is_lazy=True)
    engine.prefill(0, ids(1))
    plan(dialog, steps=0, memory_calls=0)
    with pytest.raises(GenerationError, match="the library failed"):
        engine.decode(0, ids(3))
    plan(dialog)
    for call in (
        lambda: engine.decode(0, ids(3)),
        lambda: engine.prefill(1, ids(3)),
        lambda: engine.copy_row(0, 1, 1),
    ):
        with pytest.raises(
            GenerationError, match=r"can't be used any more \(the device failed\): open the model again"
        ):
            call()
    engine.truncate(0, 0)


def test_a_row_is_not_copied_to_itself(engine: NativeEngine) -> None:
    engine.prefill(2, ids(1, 2, 3))
    with pytest.raises(GenerationError, match="row 2 can't be copied to itself; accepted: two rows"):
        engine.copy_row(2, 2, 1)
    with pytest.raises(GenerationError, match="row 2 can't be copied up to 4 tokens; accepted: 0 to the 3 it holds"):
        engine.copy_row(2, 1, 4)
    with pytest.raises(GenerationError, match="rows 4 to 4 were asked for"):
        engine.copy_row(2, 4, 1)


def test_an_interruption_ends_the_call_at_work_and_no_other(dialog: Dialog) -> None:
    engine = open_rows(dialog, is_lazy=True)
    engine.prefill(0, ids(1, 2))
    dialog.want("interrupt")  # nothing is at work
    assert engine.prefill(0, ids(3)).argmax() == checksum([1, 2, 3])
    dialog.want("steps")
    with pytest.raises(CancelledError, match="interrupted; the rows are as they were"):
        engine.prefill(0, ids(*range(40)), is_interrupted=True)
    assert len(dialog.want("steps")["steps"]) == 1  # the chunks that hadn't begun don't
    assert engine.cache_length.tolist() == [3, 0, 0, 0]
    assert engine.prefill(0, ids(4)).argmax() == checksum([1, 2, 3, 4])


def test_interruptions_that_race_with_calls_are_answered_once_each(dialog: Dialog) -> None:
    open_rows(dialog, is_lazy=True)
    assert dialog.want("race", rounds=2000)["answered"] > 0


@pytest.mark.deep
@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_rows_are_clean_under_sanitizers(native_folder: Path, flavour: str) -> None:
    with Dialog(Native(native_folder, flavour).program("rows", flags=NO_TYPES)) as dialog:
        engine = open_rows(dialog, is_lazy=False)
        engine.prefill(0, ids(*range(30)))
        engine.prefill(1, np.ones(700, np.int64))
        engine.decode(0, ids(1, -1, -1, 2))
        engine.copy_row(0, 3, 11)
        with pytest.raises(CancelledError):
            engine.prefill(2, ids(*range(40)), is_interrupted=True)
        dialog.want("race", rounds=300)
