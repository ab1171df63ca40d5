"""The ONNX Runtime backend on toy graphs: every way to fill a cache gives the same logits."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_aot.errors import ContextFullError, EngineMismatchError, GenerationError
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.bundle.manifest import CAPACITY_STEP
from qwen_aot.runtime.engine.kv_memory import HostMemory
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from tests.runtime.toys import (
    ALL_INPUTS,
    CACHE_STEP,
    HEAD_DIM,
    HEADS,
    VOCAB_SIZE,
    attention_model,
    checksum,
    checksum_model,
    io_tables,
    make_manifest,
    with_text_engine,
    write_bundle,
)

FEW_INPUTS = ("input_ids", "cache_length", "new_tokens")

RNG = np.random.default_rng(7)
# Multiples of a code's worth within the codes' range: an int8 cache holds them as they are.
TABLE = CACHE_STEP * np.rint(RNG.standard_normal((VOCAB_SIZE, HEADS * HEAD_DIM)) / CACHE_STEP).clip(-128, 127)
TABLE = TABLE.astype(np.float32)
HEAD = RNG.standard_normal((HEADS * HEAD_DIM, VOCAB_SIZE)).astype(np.float32)

# Largest difference of logits (up to 15 in size) from float64 attention. float32: rounding of sums of a few
# hundred terms, of an int8 cache too; float16: the values themselves are rounded to 11 bits.
TOLERANCE = {"float32": 2e-5, "float16": 3e-2, "int8": 2e-5}


@pytest.fixture(scope="module")
def checksum_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    return write_bundle(tmp_path_factory.mktemp("b") / "checksum", checksum_model(inputs, outputs), manifest)


@pytest.fixture
def engine(checksum_bundle: Path) -> Iterator[OnnxRuntimeEngine]:
    with OnnxRuntimeEngine(load_bundle(checksum_bundle), OrtOptions(threads=1)) as engine:
        yield engine


@pytest.fixture(params=["float32", "float16", "int8"])
def attention(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[OnnxRuntimeEngine, float]]:
    """A GroupQueryAttention engine without position_ids and key_positions, and its tolerance."""
    inputs, outputs = io_tables(FEW_INPUTS, request.param)
    manifest = make_manifest(inputs=inputs, outputs=outputs, cache_dtype=request.param)
    path = write_bundle(tmp_path / "bundle", attention_model(inputs, outputs, TABLE, HEAD), manifest)
    with OnnxRuntimeEngine(load_bundle(path), OrtOptions(threads=1)) as engine:
        yield engine, TOLERANCE[request.param]


def attention_reference(token_ids: list[int]) -> np.ndarray:
    """Logits [V] of the last token, in float64, without a cache."""
    x = TABLE[token_ids].astype(np.float64).reshape(-1, HEADS, HEAD_DIM)
    scores = np.einsum("hd,whd->hw", x[-1], x) / np.sqrt(HEAD_DIM)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("hw,whd->hd", weights, x).reshape(-1) @ HEAD.astype(np.float64)


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int64)


def test_prefill_and_decode_continue_one_sequence(engine: OnnxRuntimeEngine) -> None:
    sequence = [5, 6, 7]
    assert engine.prefill(0, ids(*sequence)).argmax() == checksum(sequence)
    for token_id in (9, 0, 210):
        sequence.append(token_id)
        logits = engine.decode(0, ids(token_id))
        assert logits.shape == (1, VOCAB_SIZE)
        assert logits[0].argmax() == checksum(sequence)
    assert engine.cache_length.tolist() == [6, 0, 0, 0]


@pytest.mark.parametrize("cut", range(1, 20))
def test_prefill_in_every_split_is_the_same(engine: OnnxRuntimeEngine, cut: int) -> None:
    # The chunk is 8, so a piece of up to 19 tokens is 1 to 3 steps.
    sequence = list(range(100, 120))
    engine.prefill(2, ids(*sequence[:cut]))
    assert engine.prefill(2, ids(*sequence[cut:])).argmax() == checksum(sequence)


def test_rows_of_unequal_length_decode_together(engine: OnnxRuntimeEngine) -> None:
    rows = [[1], [2, 3, 4, 5, 6], [7] * 20, [8, 9]]
    for row, sequence in enumerate(rows):
        engine.prefill(row, ids(*sequence))
    for token_id in (11, 12, 13):
        for sequence in rows:
            sequence.append(token_id)
        logits = engine.decode(0, ids(*[token_id] * 4))
        assert logits.argmax(axis=1).tolist() == [checksum(sequence) for sequence in rows]


def test_a_range_of_rows_leaves_the_others_alone(engine: OnnxRuntimeEngine) -> None:
    rows = [[1, 2], [3, 4, 5], [6], [7, 8]]
    for row, sequence in enumerate(rows):
        engine.prefill(row, ids(*sequence))
    logits = engine.decode(1, ids(20, 21))
    assert logits.argmax(axis=1).tolist() == [checksum([3, 4, 5, 20]), checksum([6, 21])]
    logits = engine.decode(0, ids(30, 31, 32, 33))
    expected = [[1, 2, 30], [3, 4, 5, 20, 31], [6, 21, 32], [7, 8, 33]]
    assert logits.argmax(axis=1).tolist() == [checksum(sequence) for sequence in expected]


@pytest.mark.parametrize("idle_holds", [0, 3])
def test_idle_rows_do_not_move(engine: OnnxRuntimeEngine, idle_holds: int) -> None:
    # The graph turns all logits into NaN if it ever sees an idle row with an empty cache.
    held = [40, 41, 42][:idle_holds]
    if held:
        engine.prefill(1, ids(*held))
    engine.prefill(0, ids(1))
    engine.prefill(2, ids(2))
    logits = engine.decode(0, ids(5, -1, 6))
    assert [int(logits[0].argmax()), int(logits[2].argmax())] == [checksum([1, 5]), checksum([2, 6])]
    assert engine.cache_length.tolist() == [2, idle_holds, 2, 0]
    assert engine.prefill(1, ids(50)).argmax() == checksum([*held, 50])


@pytest.fixture
def growing(checksum_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnnxRuntimeEngine]:
    """An engine as on a system where all memory takes room."""
    monkeypatch.setattr(HostMemory, "is_lazy", False)
    with OnnxRuntimeEngine(load_bundle(checksum_bundle), OrtOptions(threads=1)) as engine:
        yield engine


def test_a_reserved_cache_grows_before_the_steps(growing: OnnxRuntimeEngine) -> None:
    growing.reserve(1000)
    before = growing.cache.regions(0, 4)
    growing.prefill(0, np.ones(990, np.int64))
    for _ in range(10):
        growing.decode(0, ids(1, -1))
    assert growing.decode(0, ids(-1, 2))[1].argmax() == checksum([2])  # beside an idle row that is full
    assert growing.cache.regions(0, 4) == before


def test_the_cache_grows_and_keeps_content(growing: OnnxRuntimeEngine) -> None:
    engine = growing
    first = list(range(CAPACITY_STEP - 1))
    ids_below = [token_id % VOCAB_SIZE for token_id in first]
    other = [3, 2, 1]
    engine.prefill(0, ids(*ids_below))
    engine.prefill(3, ids(*other))
    small = engine.cache.nbytes
    for token_id in (4, 5, 6):  # 255 + 1 fits, then it grows
        ids_below.append(token_id)
        assert engine.decode(0, ids(token_id))[0].argmax() == checksum(ids_below)
    assert engine.cache.nbytes == 2 * small
    assert engine.decode(3, ids(9))[0].argmax() == checksum([*other, 9])
    more = list(range(1, 201)) * 2
    assert engine.prefill(0, ids(*more)).argmax() == checksum(ids_below + more)


def test_truncate_forgets_the_end(engine: OnnxRuntimeEngine) -> None:
    engine.prefill(0, ids(1, 2, 3, 4))
    engine.truncate(0, 2)
    assert engine.decode(0, ids(9))[0].argmax() == checksum([1, 2, 9])
    engine.truncate(0, 0)
    assert engine.prefill(0, ids(7)).argmax() == checksum([7])
    with pytest.raises(GenerationError, match="can't be cut to 5 tokens; accepted: 0 to the 1 it holds"):
        engine.truncate(0, 5)


def test_a_full_context_is_refused_and_nothing_is_written(engine: OnnxRuntimeEngine) -> None:
    sequence = [1] * 999
    engine.prefill(1, ids(*sequence))
    with pytest.raises(ContextFullError, match="row 1 holds 999 tokens and 2 more don't fit its context of 1000"):
        engine.prefill(1, ids(1, 2))
    assert engine.decode(1, ids(3))[0].argmax() == checksum([*sequence, 3])
    engine.prefill(0, ids(4))
    with pytest.raises(ContextFullError, match="row 1 holds 1000"):
        engine.decode(0, ids(5, 6))
    assert engine.cache_length.tolist() == [1, 1000, 0, 0]
    # A full row may stand idle beside one that goes on.
    assert engine.decode(0, ids(5, -1))[0].argmax() == checksum([4, 5])


def test_unknown_ids_and_empty_prompts_are_refused(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(GenerationError, match="token id 211 is not below the vocabulary's 211"):
        engine.prefill(0, ids(1, 211))
    with pytest.raises(GenerationError, match="token id -1"):
        engine.prefill(0, ids(1, -1))
    with pytest.raises(GenerationError, match="at least one"):
        engine.prefill(0, ids())
    assert engine.cache_length.tolist() == [0, 0, 0, 0]


def test_rows_that_do_not_exist_are_refused(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(GenerationError, match="rows 3 to 4 were asked for; accepted: 0 to 3"):
        engine.decode(3, ids(1, 2))
    with pytest.raises(GenerationError, match="rows -1 to -1"):
        engine.prefill(-1, ids(1))
    with pytest.raises(GenerationError, match="rows 4 to 4"):
        engine.truncate(4, 0)


def test_threads_are_at_least_one() -> None:
    with pytest.raises(GenerationError, match="threads is 0; accepted: at least 1, or None"):
        OrtOptions(threads=0)


def test_a_closed_engine_says_so(checksum_bundle: Path) -> None:
    engine = open_engine(load_bundle(checksum_bundle), threads=1)
    engine.prefill(0, ids(1, 2, 3))
    engine.close()
    engine.close()
    with pytest.raises(GenerationError, match="the engine is closed"):
        engine.prefill(0, ids(1))
    with pytest.raises(GenerationError, match="the engine is closed"):
        engine.truncate(0, 2)
    engine.truncate(0, 0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_of_prefill_decode_and_truncate(engine: OnnxRuntimeEngine, data: st.DataObject) -> None:
    rows: list[list[int]] = [[], [], [], []]
    for row in range(4):
        engine.truncate(row, 0)
    tokens = st.integers(0, VOCAB_SIZE - 1)
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["prefill", "decode", "truncate"]))
        row = data.draw(st.integers(0, 3))
        if action == "prefill":
            new = data.draw(st.lists(tokens, min_size=1, max_size=30))
            rows[row] += new
            assert engine.prefill(row, ids(*new)).argmax() == checksum(rows[row])
        elif action == "truncate":
            length = data.draw(st.integers(0, len(rows[row])))
            engine.truncate(row, length)
            del rows[row][length:]
        else:
            step = data.draw(st.lists(st.one_of(st.just(-1), tokens), min_size=1, max_size=4 - row))
            logits = engine.decode(row, ids(*step))
            for offset, token_id in enumerate(step):
                if token_id >= 0:
                    rows[row + offset].append(token_id)
                    assert logits[offset].argmax() == checksum(rows[row + offset])
        assert engine.cache_length.tolist() == [len(sequence) for sequence in rows]


def test_attention_equals_the_formula_in_every_split(attention: tuple[OnnxRuntimeEngine, float]) -> None:
    engine, tolerance = attention
    sequence = RNG.integers(0, VOCAB_SIZE, 24).tolist()
    for cut in range(1, 24):
        engine.truncate(1, 0)
        engine.prefill(1, ids(*sequence[:cut]))
        logits = engine.prefill(1, ids(*sequence[cut:]))
        np.testing.assert_allclose(logits, attention_reference(sequence), atol=tolerance)


def test_attention_with_idle_rows_and_growth(attention: tuple[OnnxRuntimeEngine, float]) -> None:
    engine, tolerance = attention
    rows = [RNG.integers(0, VOCAB_SIZE, n).tolist() for n in (250, 1, 40, 0)]
    for row, sequence in enumerate(rows[:3]):
        engine.prefill(row, ids(*sequence))
    for step in range(12):  # row 0 passes the first capacity
        tokens = RNG.integers(0, VOCAB_SIZE, 4)
        tokens[3] = -1
        tokens[1] = -1 if step % 3 == 0 else tokens[1]
        logits = engine.decode(0, tokens)
        for row in np.flatnonzero(tokens >= 0):
            rows[row].append(int(tokens[row]))
            np.testing.assert_allclose(logits[row], attention_reference(rows[row]), atol=tolerance)


def test_a_row_does_not_depend_on_the_others(attention: tuple[OnnxRuntimeEngine, float]) -> None:
    engine, _ = attention
    sequence = RNG.integers(0, VOCAB_SIZE, 12).tolist()
    results = []
    for fill in (0, 5):
        for row in (0, 2):
            engine.truncate(row, 0)
            if fill:
                engine.prefill(row, ids(*RNG.integers(0, VOCAB_SIZE, fill)))
        engine.truncate(1, 0)
        engine.prefill(1, ids(*sequence))
        results.append(engine.decode(0, ids(8 if fill else -1, 3, 9 if fill else -1))[1].copy())
    np.testing.assert_array_equal(results[0], results[1])


def test_a_copied_row_goes_on_by_itself(attention: tuple[OnnxRuntimeEngine, float]) -> None:
    engine, tolerance = attention
    sequence = RNG.integers(0, VOCAB_SIZE, 30).tolist()
    engine.prefill(0, ids(*sequence))
    engine.prefill(2, ids(*RNG.integers(0, VOCAB_SIZE, 60)))
    engine.copy_row(0, 2, 21)
    assert engine.cache_length.tolist() == [30, 0, 21, 0]
    logits = engine.decode(0, ids(7, -1, 8))
    np.testing.assert_allclose(logits[0], attention_reference([*sequence, 7]), atol=tolerance)
    np.testing.assert_allclose(logits[2], attention_reference([*sequence[:21], 8]), atol=tolerance)
    with pytest.raises(GenerationError, match="row 2 can't be copied up to 23 tokens; accepted: 0 to the 22 it holds"):
        engine.copy_row(2, 0, 23)
    engine.close()
    with pytest.raises(GenerationError, match="the engine is closed"):
        engine.copy_row(0, 1, 0)
    with pytest.raises(GenerationError, match="the engine is closed"):
        engine.reserve(1)


@pytest.mark.parametrize("rubbish", [np.nan, 65504.0])
def test_what_unused_slots_hold_does_not_matter(attention: tuple[OnnxRuntimeEngine, float], rubbish: float) -> None:
    # GroupQueryAttention reads no slot beyond a row's length. Graphs that mask by adding don't survive NaN
    # (0 * NaN is NaN): for them the cache is zero-filled.
    engine, _ = attention
    rows = [RNG.integers(0, VOCAB_SIZE, n).tolist() for n in (20, 3)]
    results = []
    for value in (0.0, rubbish):
        for view in engine.cache.views(0, 4):
            view[...] = value if view.dtype.kind == "f" else np.clip(np.nan_to_num(value, nan=-128), -128, 127)
        for row in range(2):
            engine.truncate(row, 0)
            engine.prefill(row, ids(*rows[row]))
        results.append(engine.decode(0, ids(5, 6, -1)).copy()[:2])
    np.testing.assert_array_equal(results[0], results[1])


def test_time_in_the_library_is_counted(engine: OnnxRuntimeEngine) -> None:
    started = time.perf_counter()
    engine.prefill(0, ids(*range(30)))
    after_prefill = engine.run_seconds
    engine.decode(0, ids(1))
    assert 0 < after_prefill < engine.run_seconds < time.perf_counter() - started


def test_nan_in_the_logits_names_the_row_and_changes_nothing(tmp_path: Path) -> None:
    inputs, outputs = io_tables(FEW_INPUTS, "float32")
    table = TABLE.copy()
    table[13] = np.inf
    manifest = make_manifest(inputs=inputs, outputs=outputs)
    path = write_bundle(tmp_path / "bundle", attention_model(inputs, outputs, table, HEAD), manifest)
    with OnnxRuntimeEngine(load_bundle(path), OrtOptions(threads=1)) as engine:
        engine.prefill(0, ids(1))
        engine.prefill(1, ids(2))
        with pytest.raises(GenerationError, match=r"logits of row 1 hold NaN or Inf: .*--precision fp32") as caught:
            engine.decode(0, ids(3, 13))
        assert isinstance(caught.value, NonFiniteLogitsError) and caught.value.rows == (1,)
        with pytest.raises(GenerationError, match="logits of row 0 hold"):
            engine.prefill(0, ids(*[1] * 9, 13))
        assert engine.cache_length.tolist() == [1, 1, 0, 0]
        for view in engine.cache.views(0, 4):
            assert np.isfinite(view).all()
            assert view[:2, :, 0].any() and not view[1, :, 1:].any() and not view[0, :, 1:].any()
        assert np.isfinite(engine.decode(0, ids(3, 4))).all()


def test_a_step_that_the_library_fails_changes_nothing(checksum_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    with OnnxRuntimeEngine(load_bundle(checksum_bundle), OrtOptions(threads=1)) as engine:
        engine.prefill(0, ids(1, 2))
        step, calls = engine._prefill, iter([True, False])
        assert step is not None
        library_run = step._run

        def fail_at_the_second(binding: object) -> None:
            if not next(calls):
                raise state.RuntimeException("out of memory")
            library_run(binding)

        monkeypatch.setattr(step, "_run", fail_at_the_second)
        with pytest.raises(GenerationError, match=r"ONNX Runtime failed in a step of 1 rows and 4 tokens: out of mem"):
            engine.prefill(0, ids(*range(12)))
        assert engine.cache_length.tolist() == [2, 0, 0, 0]
        monkeypatch.undo()
        assert engine.prefill(0, ids(3)).argmax() == checksum([1, 2, 3])


def test_a_fast_prefill_is_refused_where_integer_products_saturate(
    checksum_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(checksum_bundle)
    quantized = with_text_engine(bundle.manifest, quantization={"fast_prefill": True})
    monkeypatch.setattr("qwen_aot.runtime.backends.ort.engine.has_exact_integer_products", lambda: False)
    with pytest.raises(EngineMismatchError, match="Rebuild without --fast-prefill"):
        OnnxRuntimeEngine(dataclasses.replace(bundle, manifest=quantized))
    monkeypatch.setattr("qwen_aot.runtime.backends.ort.engine.has_exact_integer_products", lambda: True)
    OnnxRuntimeEngine(dataclasses.replace(bundle, manifest=quantized), OrtOptions(threads=1)).close()


def test_a_fixed_capacity_is_kept(tmp_path: Path) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32", capacity=48)
    manifest = make_manifest(inputs=inputs, outputs=outputs, max_context=40)
    path = write_bundle(tmp_path / "bundle", checksum_model(inputs, outputs), manifest)
    with OnnxRuntimeEngine(load_bundle(path), OrtOptions(threads=1)) as engine:
        sequence = list(range(40))
        assert engine.prefill(3, ids(*sequence)).argmax() == checksum(sequence)
        assert engine.cache.nbytes == 2 * 4 * HEADS * 48 * HEAD_DIM * 4


def test_an_old_onnxruntime_is_refused(checksum_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    with pytest.raises(EngineMismatchError, match=r"is 1\.31\.1, this bundle needs 1\.32 or newer.*\[cpu\]"):
        open_engine(load_bundle(checksum_bundle))


def test_a_missing_onnxruntime_names_the_extra(checksum_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineMismatchError, match=r"install it with \S+ -m pip install -e \S+\[cpu\]'"):
        open_engine(load_bundle(checksum_bundle))


def test_a_graph_that_onnxruntime_refuses(tmp_path: Path) -> None:
    inputs, outputs = io_tables(ALL_INPUTS, "float32")
    model = checksum_model(inputs, outputs)
    model.graph.node[0].op_type = "NoSuchOp"
    path = write_bundle(tmp_path / "bundle", model, make_manifest(inputs=inputs, outputs=outputs))
    with pytest.raises(EngineMismatchError, match=r"can't load .*NoSuchOp"):
        open_engine(load_bundle(path))


def test_session_options_reach_onnxruntime(checksum_bundle: Path) -> None:
    bundle = load_bundle(checksum_bundle)
    options = OrtOptions(threads=1, optimize=False, config={"session.qdq_matmulnbits_accuracy_level": "1"})
    with OnnxRuntimeEngine(bundle, options) as engine:
        found = engine.session.get_session_options()
        assert found.get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "1"
        assert found.intra_op_num_threads == 1


def test_memory_stays_flat(engine: OnnxRuntimeEngine) -> None:
    def generate(times: int) -> None:
        for i in range(times):
            engine.truncate(0, 0)
            engine.prefill(0, np.arange(1, 2 + i % 17, dtype=np.int64))
            for token_id in range(3):
                engine.decode(0, ids(token_id))

    process = psutil.Process()
    generate(200)
    before = process.memory_info().rss
    generate(1000)
    assert process.memory_info().rss - before < 2 << 20  # bytes; a leak of 2 KiB a generation would show


def test_the_runtime_imports_without_the_exporters_packages() -> None:
    code = """
import sys
import time
for name in ("torch", "onnx", "onnx_ir", "transformers", "exporter", "engines"):
    sys.modules[name] = None
import qwen_aot.runtime.backends.ort.engine, qwen_aot.runtime.generation.chat, qwen_aot.runtime.generation.generator
assert "onnxruntime" not in sys.modules
"""
    root = Path(__file__).parents[4]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root)
