"""Steps that check drafted tokens: what they tell, what a row holds afterwards, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.errors import ContextFullError, EngineMismatchError, GenerationError
from qwen_aot.runtime.backends.ort.engine import OnnxRuntimeEngine, OrtOptions
from qwen_aot.runtime.bundle.load import load_bundle
from qwen_aot.runtime.engine.protocol import NonFiniteLogitsError
from qwen_aot.runtime.generation import speculation
from qwen_aot.runtime.generation.generator import Generator
from tests.checkpoints import save_tiny
from tests.runtime.toys import ALL_INPUTS, VOCAB_SIZE, checksum, checksum_model, io_tables, make_manifest, write_bundle

INPUTS = (*ALL_INPUTS, "logits_positions")
MOST, ROWS, CONTEXT = 4, 4, 1000


def write_checksum(folder: Path, *, logits_rows: int | None = MOST) -> Path:
    names = ALL_INPUTS if logits_rows is None else INPUTS
    inputs, outputs = io_tables(names, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs, logits_rows=logits_rows)
    return write_bundle(folder, checksum_model(inputs, outputs), manifest)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checksum(tmp_path_factory.mktemp("b") / "checksum")


@pytest.fixture
def engine(bundle: Path) -> Iterator[OnnxRuntimeEngine]:
    with OnnxRuntimeEngine(load_bundle(bundle), OrtOptions(threads=1)) as engine:
        yield engine


def block(*rows: list[int], width: int) -> np.ndarray:
    """Tokens of each row, padded with -1."""
    return np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int64)


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, np.int64)


tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=MOST)
actions = st.one_of(
    st.tuples(st.just("prefill"), st.integers(0, ROWS - 1), st.lists(st.integers(0, 210), min_size=1, max_size=12)),
    st.tuples(st.just("decode"), st.lists(st.integers(-1, 210), min_size=1, max_size=ROWS)),
    st.tuples(st.just("verify"), st.lists(tokens, min_size=1, max_size=ROWS), st.integers(2, MOST)),
    st.tuples(st.just("cut"), st.integers(0, ROWS - 1), st.integers(0, 3)),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(actions, min_size=1, max_size=12))
def test_any_order_of_steps_tells_what_rows_hold(engine: OnnxRuntimeEngine, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    """Each logits row peaks at the checksum of all tokens up to its own, whatever was taken back before."""
    rows: list[list[int]] = [[] for _ in range(ROWS)]
    for row in range(ROWS):
        engine.truncate(row, 0)
    for kind, *what in steps:
        if kind == "prefill":
            row, new = what
            rows[row] += new
            assert engine.prefill(row, ids(*new)).argmax() == checksum(rows[row])
        elif kind == "decode":
            logits = engine.decode(0, ids(*what[0]))
            for row, token_id in enumerate(what[0]):
                if token_id >= 0:
                    rows[row].append(token_id)
                    assert logits[row].argmax() == checksum(rows[row])
        elif kind == "verify":
            texts, width = [text[: what[1]] for text in what[0]], what[1]
            logits = engine.verify(0, block(*texts, width=width))
            assert logits.shape == (len(texts), width, VOCAB_SIZE)
            for row, text in enumerate(texts):
                for place, token_id in enumerate(text):
                    rows[row].append(token_id)
                    assert logits[row, place - len(text)].argmax() == checksum(rows[row])
        else:
            row, count = what
            length = max(0, len(rows[row]) - count)
            engine.truncate(row, length)
            del rows[row][length:]
        assert engine.cache_length.tolist() == list(map(len, rows))


def test_rows_in_the_middle(engine: OnnxRuntimeEngine) -> None:
    engine.prefill(1, ids(5, 6))
    engine.prefill(3, ids(7))
    logits = engine.verify(1, block([8, 9], [], [10, 11, 12], width=3))
    assert [int(row.argmax()) for row in logits[0, 1:]] == [checksum([5, 6, 8]), checksum([5, 6, 8, 9])]
    assert int(logits[2, 0].argmax()) == checksum([7, 10])
    assert engine.cache_length.tolist() == [0, 4, 0, 4]


def test_a_row_may_be_filled_to_its_last_slot(engine: OnnxRuntimeEngine) -> None:
    """A short row's padding lies beyond the context, where there is room for a chunk."""
    text = [1 + i % 200 for i in range(CONTEXT - 1)]
    engine.prefill(0, ids(*text))
    engine.prefill(1, ids(3))
    logits = engine.verify(0, block([4], [5, 6, 7], width=3))
    assert int(logits[0, -1].argmax()) == checksum([*text, 4])
    assert int(logits[1, -1].argmax()) == checksum([3, 5, 6, 7])
    with pytest.raises(ContextFullError, match=f"row 0 holds {CONTEXT} tokens and 1 more don't fit"):
        engine.verify(0, block([4], [5], width=2))
    assert int(engine.verify(0, block([], [5], width=2))[1, -1].argmax()) == checksum([3, 5, 6, 7, 5])
    assert engine.cache_length.tolist() == [CONTEXT, 5, 0, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (block([1], width=1), "1 tokens of a row were to be verified; accepted: 2 to 4"),
        (block([1], width=5), "5 tokens of a row were to be verified; accepted: 2 to 4"),
        (block([1, VOCAB_SIZE], width=2), f"token id {VOCAB_SIZE} is not below the vocabulary's {VOCAB_SIZE}"),
        (block(*[[1]] * 5, width=2), "rows 0 to 4 were asked for; accepted: 0 to 3"),
    ],
)
def test_what_is_refused(engine: OnnxRuntimeEngine, rows: np.ndarray, message: str) -> None:
    engine.prefill(0, ids(1, 2))
    with pytest.raises(GenerationError, match=message):
        engine.verify(0, rows)
    assert engine.cache_length.tolist() == [2, 0, 0, 0]


def test_a_bundle_without_them_and_a_closed_engine(engine: OnnxRuntimeEngine, tmp_path: Path) -> None:
    with (
        OnnxRuntimeEngine(load_bundle(write_checksum(tmp_path / "plain", logits_rows=None))) as plain,
        pytest.raises(GenerationError, match="the logits of a row's last token only; rebuild it with --speculate"),
    ):
        plain.verify(0, block([1, 2], width=2))
    engine.close()
    with pytest.raises(GenerationError, match="the engine is closed"):
        engine.verify(0, block([1, 2], width=2))


def test_logits_that_are_not_finite_name_the_row_and_change_nothing(tmp_path: Path) -> None:
    """Of its own tokens: what stands before those of a short row, and idle rows, may hold anything."""
    inputs, outputs = io_tables(INPUTS, "float32")
    model = checksum_model(inputs, outputs)
    # What follows a text whose checksum is 7 is NaN.
    (distance,) = (node for node in model.graph.node if "last_logits" in node.output)
    distance.output[0] = "plain"
    add_nan(model)
    manifest = make_manifest(inputs=inputs, outputs=outputs, logits_rows=MOST)
    with OnnxRuntimeEngine(load_bundle(write_bundle(tmp_path / "bundle", model, manifest))) as engine:
        engine.prefill(0, ids(2))
        engine.prefill(1, ids(1))
        with pytest.raises(NonFiniteLogitsError) as caught:
            engine.verify(0, block([1, 2], [3, 9], width=2))  # 1 + 2 * 3 = 7
        assert caught.value.rows == (1,)
        assert engine.cache_length.tolist() == [1, 1, 0, 0]
        logits = engine.verify(0, block([1, 2], [], width=2))
        assert int(logits[0, -1].argmax()) == checksum([2, 1, 2])
        assert int(engine.verify(1, block([4, 9], width=2))[0, -1].argmax()) == checksum([1, 4, 9])


def add_nan(model: object) -> None:
    """Makes `last_logits` of `plain`, with NaN in the rows that peak at 7."""
    import onnx
    from onnx import helper, numpy_helper

    assert isinstance(model, onnx.ModelProto)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(7, np.int64), "seven"))
    graph.initializer.append(numpy_helper.from_array(np.array(np.nan, np.float32), "nan"))
    at = next(i for i, node in enumerate(graph.node) if "plain" in node.output) + 1
    for offset, node in enumerate(
        (
            helper.make_node("ArgMax", ["plain"], ["peak"], axis=2, keepdims=1),
            helper.make_node("Equal", ["peak", "seven"], ["is_seven"]),
            helper.make_node("Where", ["is_seven", "nan", "plain"], ["last_logits"]),
        )
    ):
        graph.node.insert(at + offset, node)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: {"outputs": text.outputs[:1] + text.outputs[2:], "logits_rows": None},
            "logits_positions' is int64",
        ),
        (lambda text: {"logits_rows": None}, "logits_rows is None, and the output 'last_logits' is float32"),
        (lambda text: {"logits_rows": 9}, "logits_rows is 9; accepted: 2 to prefill_chunk = 8"),
    ],
)
def test_manifests_that_contradict_themselves(bundle: Path, change: Callable, message: str) -> None:  # type: ignore[type-arg]
    manifest = load_bundle(bundle).manifest
    with pytest.raises(Exception, match=message):
        dataclasses.replace(
            manifest,
            engines=dataclasses.replace(
                manifest.engines,
                text=dataclasses.replace(manifest.engines.text, **change(manifest.engines.text)),
            ),
        )


def test_a_graph_that_is_not_the_manifests(tmp_path: Path) -> None:
    plain_inputs, plain_outputs = io_tables(ALL_INPUTS, "float32")
    inputs, outputs = io_tables(INPUTS, "float32")
    manifest = make_manifest(inputs=inputs, outputs=outputs, logits_rows=MOST)
    path = write_bundle(tmp_path / "bundle", checksum_model(plain_inputs, plain_outputs), manifest)
    with pytest.raises(EngineMismatchError, match=r"only in the manifest \['logits_positions'\]"):
        OnnxRuntimeEngine(load_bundle(path))


@pytest.fixture(scope="module")
def tiny_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model's bundle with and without."""
    root = tmp_path_factory.mktemp("tiny")
    save_tiny(root / "checkpoint", with_tokenizer=True, kv_heads=2)
    for name, speculate in (("plain", None), ("speculating", 5)):
        spec = BuildSpec(precision=Precision.FP32, max_context=256, max_batch=3, speculate=speculate)
        build_bundle(root / "checkpoint", spec, root / name)
    return {name: root / name for name in ("plain", "speculating")}


def test_a_built_bundle_verifies_what_it_decodes(tiny_bundles: dict[str, Path]) -> None:
    """fp32: sums of other shapes in another order; seen: 4e-6, of logits with a standard deviation of 1."""
    rng = np.random.default_rng(5)
    with OnnxRuntimeEngine(load_bundle(tiny_bundles["speculating"])) as engine:
        assert engine.manifest.engines.text.logits_rows == 5
        assert [profile.name for profile in engine.manifest.engines.text.profiles] == ["prefill", "decode", "verify"]
        for row, length in enumerate((40, 3, 17)):
            engine.prefill(row, rng.integers(1, 130, length))
        held, new = engine.cache_length, rng.integers(1, 130, (3, 5))
        decoded = np.stack([engine.decode(0, new[:, place]).copy() for place in range(5)], axis=1)
        for row in range(3):
            engine.truncate(row, int(held[row]))
        verified = engine.verify(0, new)
        np.testing.assert_allclose(verified, decoded, atol=1e-4, rtol=0)
        assert engine.cache_length.tolist() == (held + 5).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.1, "seed": 3, "presence_penalty": 0.1}], ids=["greedy", "sampled"]
)
def test_generated_tokens_are_those_of_plain_decoding(
    tiny_bundles: dict[str, Path], options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real graph, several rows at once, with every draft checked."""
    monkeypatch.setattr(speculation.StepCosts, "ratios", lambda costs: [1.0] * len(costs._seconds))
    prompts = [[5, 6, 7, 8] * 6, [9, 10], [11] * 9]
    found = {}
    for name, path in tiny_bundles.items():
        with Generator.open(path) as generator:
            config = {"max_new_tokens": 60, "ignore_eos": True, **options}
            found[name] = [each.token_ids for each in generator.generate(prompts, **config)]
            statistics = generator.speculation
    assert found["speculating"] == found["plain"]
    assert statistics is not None
    assert statistics.draft_tokens > 20
