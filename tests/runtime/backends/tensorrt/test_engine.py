"""The TensorRT backend on strict doubles: content, shapes, captured graphs, and what is left at the end."""

import gc
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_aot.errors import ContextFullError, GenerationError
from qwen_aot.runtime.backends.open import open_engine
from qwen_aot.runtime.backends.tensorrt.engine import TensorRtEngine
from qwen_aot.runtime.backends.tensorrt.graphs import MAX_GRAPHS
from qwen_aot.runtime.backends.tensorrt.step import WINDOW_STEP
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from tests.checkpoints import reference_logits, save_tiny
from tests.doubles.bundles import export_tensorrt_bundle, write_tensorrt_bundle
from tests.doubles.gpu import Gpu
from tests.doubles.install import installed
from tests.runtime.backends.tensorrt.engines import FLAVOURS, ids, opened, write_checksum_bundle
from tests.runtime.toys import VOCAB_SIZE, attention_model, checksum, io_tables, make_manifest

# Largest difference of logits (std 1) from transformers in float32: rounding of a few layers' sums.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FLAVOURS)
def checksum_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checksum_bundle(tmp_path_factory.mktemp("b") / "checksum", request.param)


@pytest.fixture(scope="module")
def captured_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the flavour whose graphs are captured here."""
    return write_checksum_bundle(tmp_path_factory.mktemp("b") / "captured", "tensorrt")


@pytest.fixture(scope="module", params=["gqa", "moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A tiny model of transformers, and its bundle with room for 600 tokens in each of 4 rows."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_tiny(folder / "checkpoint", kv_heads=2, moe={} if request.param == "moe" else None)
    return reference, export_tensorrt_bundle(folder / "checkpoint", folder / "bundle", "tensorrt")


def greedy(engine: TensorRtEngine, prompt: list[int], count: int) -> list[int]:
    made = [int(engine.prefill(0, ids(*prompt)).argmax())]
    while len(made) < count:
        made.append(int(engine.decode(0, ids(made[-1]))[0].argmax()))
    return made


def reference_greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    made = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(token) for token in made[0, len(prompt) :]]


def test_greedy_text_is_that_of_transformers(model: tuple[torch.nn.Module, Path]) -> None:
    reference, bundle = model
    prompt = [1 + (7 * i) % 130 for i in range(230)]  # no padding id; 15 chunks of 16; the text crosses W = 256
    with opened(bundle) as (engine, gpu):
        assert greedy(engine, prompt, 64) == reference_greedy(reference, prompt, 64)
        assert gpu.calls["cudaGraphLaunch"] > 50
        assert gpu.calls["cudaStreamBeginCapture"] == 2  # W = 256, then W = 512


def test_rtx_captures_its_own_graphs(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path / "checkpoint", kv_heads=2)
    bundle = export_tensorrt_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "tensorrt_rtx")
    with opened(bundle) as (engine, gpu):
        assert greedy(engine, [1, 2, 3], 64) == reference_greedy(reference, [1, 2, 3], 64)
        assert gpu.calls["cudaStreamBeginCapture"] == 0
        strategies = [context._raw._config.cuda_graph_strategy.name for context in _contexts(engine)]
        assert strategies == ["DISABLED", "WHOLE_GRAPH_CAPTURE"]  # prefill has a new shape for each prompt


def _contexts(engine: TensorRtEngine) -> list:  # type: ignore[type-arg]
    assert engine._prefill is not None and engine._decode is not None
    return [engine._prefill._context, engine._decode._context]


def test_a_float16_cache(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path / "checkpoint", kv_heads=2)
    bundle = export_tensorrt_bundle(
        tmp_path / "checkpoint", tmp_path / "bundle", "tensorrt_rtx", dtype=ir.DataType.FLOAT16
    )
    sequence = list(range(1, 30))
    with opened(bundle) as (engine, _):
        engine.prefill(2, ids(*sequence[:20]))
        for token_id in sequence[20:]:
            logits = engine.decode(2, ids(token_id))[0]
        # Weights and cache of 11 bits; logits have a standard deviation of 1.
        np.testing.assert_allclose(logits, reference_logits(reference, [sequence])[0, -1], atol=3e-2)


def test_rows_of_unequal_length_decode_together(model: tuple[torch.nn.Module, Path]) -> None:
    reference, bundle = model
    rows = [[1], list(range(2, 40)), [3] * 20, [8, 9]]
    with opened(bundle) as (engine, _):
        for row, sequence in enumerate(rows):
            engine.prefill(row, ids(*sequence))
        for token_id in range(11, 16):
            step = [token_id, token_id + 1, -1 if token_id % 2 else token_id, token_id + 2]
            logits = engine.decode(0, ids(*step))
            for row, new in enumerate(step):
                if new >= 0:
                    rows[row].append(new)
                    expected = reference_logits(reference, [rows[row]])[0, -1]
                    np.testing.assert_allclose(logits[row], expected, atol=TOLERANCE)


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 16, 17])
def test_prefill_in_every_split_is_the_same(checksum_bundle: Path, cut: int) -> None:
    sequence = list(range(100, 120))  # chunks of 8
    with opened(checksum_bundle) as (engine, _):
        engine.prefill(2, ids(*sequence[:cut]))
        assert engine.prefill(2, ids(*sequence[cut:])).argmax() == checksum(sequence)


def test_a_range_of_rows_leaves_the_others_alone(checksum_bundle: Path) -> None:
    rows = [[1, 2], [3, 4, 5], [6], [7, 8]]
    with opened(checksum_bundle) as (engine, _):
        for row, sequence in enumerate(rows):
            engine.prefill(row, ids(*sequence))
        logits = engine.decode(1, ids(20, 21))
        assert logits.argmax(axis=1).tolist() == [checksum([3, 4, 5, 20]), checksum([6, 21])]
        logits = engine.decode(0, ids(30, 31, 32, 33))
        expected = [[1, 2, 30], [3, 4, 5, 20, 31], [6, 21, 32], [7, 8, 33]]
        assert logits.argmax(axis=1).tolist() == [checksum(sequence) for sequence in expected]


@pytest.mark.parametrize("idle_holds", [0, 3])
def test_idle_rows_do_not_move(checksum_bundle: Path, idle_holds: int) -> None:
    # The graph turns all logits into NaN if it ever sees an idle row with an empty cache.
    held = [40, 41, 42][:idle_holds]
    with opened(checksum_bundle) as (engine, _):
        if held:
            engine.prefill(1, ids(*held))
        rows = [[1], [2]]
        engine.prefill(0, ids(1))
        engine.prefill(2, ids(2))
        for token_id in range(5, 9):  # enqueued, captured and replayed
            for row in rows:
                row.append(token_id)
            logits = engine.decode(0, ids(token_id, -1, token_id))
            assert [int(logits[0].argmax()), int(logits[2].argmax())] == [checksum(row) for row in rows]
        assert engine.cache_length.tolist() == [5, idle_holds, 5, 0]
        assert engine.prefill(1, ids(50)).argmax() == checksum([*held, 50])


def test_a_full_context_is_refused_and_nothing_is_written(checksum_bundle: Path) -> None:
    sequence = [1] * 999
    with opened(checksum_bundle) as (engine, _):
        engine.prefill(1, ids(*sequence))
        with pytest.raises(ContextFullError, match="row 1 holds 999 tokens and 2 more don't fit its context of 1000"):
            engine.prefill(1, ids(1, 2))
        assert engine.decode(1, ids(3))[0].argmax() == checksum([*sequence, 3])
        with pytest.raises(ContextFullError, match="row 1 holds 1000"):
            engine.decode(1, ids(6))
        engine.prefill(0, ids(4))
        assert engine.decode(0, ids(5, -1))[0].argmax() == checksum([4, 5])
        assert engine.cache_length.tolist() == [2, 1000, 0, 0]


def test_a_copied_row_goes_on_by_itself(checksum_bundle: Path) -> None:
    with opened(checksum_bundle) as (engine, gpu):
        engine.prefill(0, ids(1, 2, 3, 4))
        engine.prefill(3, ids(*range(50, 70)))  # longer than what comes
        engine.copy_row(0, 3, 3)
        assert engine.cache_length.tolist() == [4, 0, 0, 3]
        logits = engine.decode(0, ids(5, -1, -1, 6))
        assert [int(logits[0].argmax()), int(logits[3].argmax())] == [checksum([1, 2, 3, 4, 5]), checksum([1, 2, 3, 6])]
        engine.copy_row(0, 1, 0)
        assert engine.cache_length.tolist() == [5, 0, 0, 4]
        for source, target, length, message in (
            (0, 0, 1, "row 0 can't be copied to itself"),
            (0, 1, 6, "row 0 can't be copied up to 6 tokens; accepted: 0 to the 5 it holds"),
            (0, 4, 1, "rows 4 to 4 were asked for; accepted: 0 to 3"),
        ):
            with pytest.raises(GenerationError, match=message):
                engine.copy_row(source, target, length)
        assert gpu.calls["cudaMemcpy2DAsync"] == len(engine.cache.tensors)
        engine.reserve(1000)  # all of it is there from the start
        with pytest.raises(ContextFullError):
            engine.reserve(1001)


def test_a_copy_that_fails_leaves_the_target_empty(checksum_bundle: Path) -> None:
    with opened(checksum_bundle) as (engine, gpu):
        engine.prefill(0, ids(1, 2, 3))
        engine.prefill(1, ids(4))
        gpu.fail("cudaMemcpy2DAsync", nth=2)
        with pytest.raises(GenerationError, match="the GPU failed in cudaMemcpy2DAsync: cudaErrorUnknown"):
            engine.copy_row(0, 1, 3)
        assert engine.cache_length.tolist() == [3, 0, 0, 0]
        engine.copy_row(0, 1, 3)
        assert engine.decode(1, ids(9))[0].argmax() == checksum([1, 2, 3, 9])


def test_a_chat_goes_on_where_it_was_cut(checksum_bundle: Path) -> None:
    with opened(checksum_bundle) as (engine, _):
        engine.prefill(0, ids(1, 2, 3, 4))
        engine.decode(0, ids(5))
        engine.truncate(0, 3)
        assert engine.prefill(0, ids(9, 8)).argmax() == checksum([1, 2, 3, 9, 8])
        assert engine.decode(0, ids(7))[0].argmax() == checksum([1, 2, 3, 9, 8, 7])
        with pytest.raises(GenerationError, match="can't be cut to 9 tokens; accepted: 0 to the 6 it holds"):
            engine.truncate(0, 9)


def test_inputs_that_the_engine_has_not_are_not_bound(tmp_path: Path) -> None:
    inputs, outputs = io_tables(("input_ids", "cache_length", "new_tokens"), "float32", capacity=1024)
    table = np.random.default_rng(1).standard_normal((VOCAB_SIZE, 16)).astype(np.float32)
    toy = attention_model(inputs, outputs, table, table.T)
    bundle = write_tensorrt_bundle(
        tmp_path / "bundle", toy, make_manifest(inputs=inputs, outputs=outputs), "tensorrt_rtx"
    )
    with opened(bundle) as (engine, _):
        alone = engine.prefill(0, ids(1, 2, 3)).copy()
        engine.prefill(1, ids(1, 2))
        np.testing.assert_allclose(engine.decode(1, ids(3))[0], alone, atol=1e-5)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mix_of_prefill_decode_and_truncate(captured_bundle: Path, data: st.DataObject) -> None:
    rows: list[list[int]] = [[], [], [], []]
    tokens = st.integers(0, VOCAB_SIZE - 1)
    with opened(captured_bundle) as (engine, _):
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
                for _ in range(data.draw(st.integers(1, 4))):  # often enough to be captured and replayed
                    logits = engine.decode(row, ids(*step))
                    for offset, token_id in enumerate(step):
                        if token_id >= 0:
                            rows[row + offset].append(token_id)
                            assert logits[offset].argmax() == checksum(rows[row + offset])
            assert engine.cache_length.tolist() == [len(sequence) for sequence in rows]


class TestGraphs:
    def test_a_shape_that_comes_again_is_captured_and_replayed(self, captured_bundle: Path) -> None:
        with opened(captured_bundle) as (engine, gpu):
            sequence = [1]
            engine.prefill(0, ids(1))
            counts = []
            for token_id in range(5):
                sequence.append(token_id)
                assert engine.decode(0, ids(token_id))[0].argmax() == checksum(sequence)
                counts.append((gpu.calls["cudaStreamBeginCapture"], gpu.calls["cudaGraphLaunch"]))
            # Once as it comes; once more, and captured then; replayed ever after.
            assert counts == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)]

    def test_a_replay_asks_the_library_for_nothing_else(self, captured_bundle: Path) -> None:
        with opened(captured_bundle) as (engine, gpu):
            for token_id in range(4):
                engine.decode(0, ids(token_id))
            before = gpu.calls.copy()
            engine.decode(0, ids(9))
            assert dict(gpu.calls - before) == {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1, "kernel": 1}

    def test_each_range_of_rows_and_each_window_has_its_own(self, captured_bundle: Path) -> None:
        with opened(captured_bundle) as (engine, gpu):
            rows = [[1] * (WINDOW_STEP - 3), [2], [3]]
            for row, sequence in enumerate(rows):
                engine.prefill(row, ids(*sequence))
            for first, count in ((0, 3), (1, 2), (1, 1), (0, 3), (1, 2)):
                for token_id in range(4):  # row 0 passes W = 256 in its second turn
                    logits = engine.decode(first, ids(*[token_id] * count))
                    for offset in range(count):
                        rows[first + offset].append(token_id)
                        assert logits[offset].argmax() == checksum(rows[first + offset])
            assert gpu.calls["cudaStreamBeginCapture"] == 4  # (0, 3) of both windows, (1, 2), (1, 1)

    def test_their_number_is_bounded(self, captured_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qwen_aot.runtime.backends.tensorrt.graphs.MAX_GRAPHS", 3)
        with opened(captured_bundle) as (engine, gpu):
            rows: list[list[int]] = [[], [], [], []]
            for first, count in ((0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (0, 1)):
                for token_id in range(3):
                    logits = engine.decode(first, ids(*[token_id] * count))
                    for offset in range(count):
                        rows[first + offset].append(token_id)
                        assert logits[offset].argmax() == checksum(rows[first + offset])
                assert len(gpu.executables) <= 3
            assert gpu.calls["cudaStreamBeginCapture"] == 6  # (0, 1) had been pushed out
            assert gpu.objects["context"] == 2 + 3

    def test_one_context_of_four_thousand_tokens_fits(self) -> None:
        assert MAX_GRAPHS * WINDOW_STEP >= 4096

    @pytest.mark.parametrize(
        "call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "create_execution_context"]
    )
    def test_without_a_capture_steps_are_enqueued(
        self, captured_bundle: Path, caplog: pytest.LogCaptureFixture, call: str
    ) -> None:
        with opened(captured_bundle) as (engine, gpu), caplog.at_level(logging.WARNING):
            gpu.fail(call)
            sequence = []
            for token_id in range(8):
                sequence.append(token_id)
                assert engine.decode(0, ids(token_id))[0].argmax() == checksum(sequence)
            assert gpu.calls["cudaGraphLaunch"] == 0 and gpu.objects["context"] == 2
        (record,) = caplog.records
        assert "decode steps run without CUDA graphs" in record.getMessage()

    def test_a_step_that_cannot_be_captured_ends_the_capture(
        self, captured_bundle: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with opened(captured_bundle) as (engine, gpu):
            engine.decode(0, ids(0))
            gpu.fail("execute_async_v3", nth=2)  # the second step's, then the capture's
            assert engine.decode(0, ids(1))[0].argmax() == checksum([0, 1])
            assert not gpu.graphs and gpu.calls["cudaStreamEndCapture"] == 1
            assert engine.decode(0, ids(2))[0].argmax() == checksum([0, 1, 2])
        assert "failed to start a step" in caplog.text


def test_nan_in_the_logits_names_the_row_and_changes_nothing(tmp_path: Path) -> None:
    inputs, outputs = io_tables(("input_ids", "cache_length", "new_tokens"), "float32", capacity=1024)
    table = np.random.default_rng(1).standard_normal((VOCAB_SIZE, 16)).astype(np.float32)
    table[13] = np.inf
    toy = attention_model(inputs, outputs, table, np.ones((16, VOCAB_SIZE), np.float32))
    bundle = write_tensorrt_bundle(tmp_path / "bundle", toy, make_manifest(inputs=inputs, outputs=outputs), "tensorrt")
    with opened(bundle) as (engine, gpu):
        engine.prefill(0, ids(1))
        engine.prefill(1, ids(2))
        for _ in range(3):  # enqueued, captured, replayed
            with pytest.raises(NonFiniteLogitsError, match=r"logits of row 1 hold NaN or Inf") as caught:
                engine.decode(0, ids(3, 13))
            assert caught.value.rows == (1,)
        with pytest.raises(NonFiniteLogitsError, match="logits of row 0 hold"):
            engine.prefill(0, ids(*[1] * 9, 13))
        assert engine.cache_length.tolist() == [1, 1, 0, 0]
        assert np.isfinite(engine.decode(0, ids(3, 4))).all()
        for tensor in engine.cache.tensors:  # [4, 2, 1024, 8]
            content = gpu.view(tensor.address, 4 * tensor.row_bytes).view(np.float32).reshape(4, *tensor.row_shape)
            assert np.isfinite(content).all()
            assert content[:2, :, :2].all(axis=-1).all() and not content[:2, :, 2:].any()


def test_unknown_ids_and_rows_are_refused(checksum_bundle: Path) -> None:
    with opened(checksum_bundle) as (engine, gpu):
        with pytest.raises(GenerationError, match="token id 211 is not below the vocabulary's 211"):
            engine.decode(0, ids(211))
        with pytest.raises(GenerationError, match="rows 3 to 4 were asked for; accepted: 0 to 3"):
            engine.decode(3, ids(1, 2))
        assert gpu.calls["execute_async_v3"] == 0


def test_everything_ends_in_order(captured_bundle: Path) -> None:
    with opened(captured_bundle) as (engine, gpu):
        for token_id in range(3):
            engine.decode(0, ids(token_id))
        gpu.log.clear()
        engine.close()
        kinds = list(dict.fromkeys(gpu.log))
        assert kinds == ["context", "engine", "runtime", "graph", "free", "stream"]
        assert gpu.log.count("context") == 3
        engine.close()
        with pytest.raises(GenerationError, match="the engine is closed; open the bundle again"):
            engine.prefill(0, ids(1))


def test_an_engine_that_is_dropped_frees_everything(captured_bundle: Path) -> None:
    with installed(Gpu()) as gpu:
        engine = TensorRtEngine(load_bundle(captured_bundle))
        engine.decode(0, ids(1))
        assert gpu.allocations
        del engine
        gc.collect()
        assert not gpu.allocations and not gpu.streams


def test_memory_is_allocated_once(captured_bundle: Path) -> None:
    with opened(captured_bundle) as (engine, gpu):
        before = (gpu.calls["cudaMalloc"], gpu.calls["cudaMallocHost"])
        for row in range(4):
            engine.prefill(row, ids(*range(30)))
        for token_id in range(300):
            engine.decode(0, ids(*[token_id % VOCAB_SIZE] * 4))
        assert (gpu.calls["cudaMalloc"], gpu.calls["cudaMallocHost"]) == before


def test_time_on_the_gpu_is_counted(checksum_bundle: Path) -> None:
    with opened(checksum_bundle) as (engine, _):
        engine.prefill(0, ids(*range(30)))
        after_prefill = engine.run_seconds
        engine.decode(0, ids(1))
        assert 0 < after_prefill < engine.run_seconds


def test_a_decode_profile_may_take_more_tokens_than_one(tmp_path: Path) -> None:
    bundle = write_checksum_bundle(tmp_path / "bundle", decode_tokens=2)
    with opened(bundle) as (engine, gpu):
        assert engine.decode(0, ids(5))[0].argmax() == checksum([5])
        assert gpu.log[-1] == "step (1, 1)"


def test_threads_are_refused(checksum_bundle: Path) -> None:
    with pytest.raises(GenerationError, match="threads is 2, and the bundle's engine runs on a GPU: leave it out"):
        open_engine(load_bundle(checksum_bundle), threads=2)


def test_the_backend_imports_without_its_libraries() -> None:
    code = """
import sys
for name in ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "exporter", "engines"):
    sys.modules[name] = None
import qwen_aot.runtime.backends.tensorrt.engine
"""
    root = Path(__file__).parents[4]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root)
