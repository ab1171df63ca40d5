"""The trace cache of the tests: a trace through it is the trace without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest

from qwen_aot.exporter.graph import trace as tracing
from qwen_aot.exporter.model.position_tables import PositionTables
from qwen_aot.exporter.weights.recipe import Traced
from tests.exporter.graph.test_trace import DENSE, MOE
from tests.traces import POSITIONS, REAL, CachedExport


def described(traced: Traced) -> tuple[bytes, list[object], list[object]]:
    """The graph's bytes, its initializers, and its recipes without what can't be compared: functions."""
    initializers: list[object] = []
    for value in traced.model.graph.initializers.values():
        initializers.append((value.name, value.dtype, value.shape))
        value.const_value = ir.tensor([0])  # one that has bytes
    content = ir.serde.serialize_model(traced.model).SerializeToString()
    recipes = [(name, r.sources, r.outputs, r.rows_per_group, r.from_codes) for name, r in traced.recipes.items()]
    return content, initializers, list(recipes)


FIRST = dataclasses.replace(DENSE, model_type="qwen", logn_attn_length=16, dynamic_ntk_length=16)
CALLS = [
    (FIRST, ir.DataType.FLOAT, {"positions": 64, "context": 40}),
    (DENSE, ir.DataType.FLOAT, {}),
    (DENSE, ir.DataType.FLOAT16, {"positions": 40, "capacity": 40}),
    (DENSE, ir.DataType.FLOAT16, {"positions": 3000}),
    (MOE, ir.DataType.BFLOAT16, {"gather_up_to_tokens": 3}),
    (DENSE, ir.DataType.FLOAT, {"speculates": True}),
]


@pytest.mark.parametrize(
    ("config", "dtype", "options"), CALLS, ids=["first", "dense", "fixed", "long", "moe", "speculates"]
)
def test_a_trace_by_way_of_the_cache_is_the_fresh_one(config, dtype, options, tmp_path, monkeypatch):
    def traced(export):
        monkeypatch.setattr(tracing, "_export", export)
        return tracing.trace(config, dtype, **options)

    fresh = described(traced(REAL))
    assert described(traced(CachedExport(tmp_path))) == fresh

    def fail(*_):
        pytest.fail("torch was asked again")

    for _ in range(2):  # by another process, and again: what a caller does to its graph stays its own
        assert described(traced(CachedExport(tmp_path, fail))) == fresh


def test_whatever_torch_is_given_but_positions_is_a_trace_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def export(*arguments: object) -> ir.Graph:
        asked.append(arguments)
        names = ("rotary_cos", "rotary_sin", "query_scales")
        made = [ir.Value(name=name, shape=ir.Shape([POSITIONS, 4])) for name in names]
        return ir.Graph([], [], nodes=[], initializers=made, name=str(len(asked)))

    cached = CachedExport(tmp_path, export)
    tables = PositionTables(POSITIONS)
    base = (DENSE, ir.DataType.FLOAT, tracing._templates(DENSE), tables, False)
    others = [
        (dataclasses.replace(DENSE, rope_theta=DENSE.rope_theta + 1), *base[1:]),
        (dataclasses.replace(DENSE, tie_word_embeddings=not DENSE.tie_word_embeddings), *base[1:]),
        (base[0], ir.DataType.FLOAT16, *base[2:]),
        (*base[:2], tracing._templates(MOE), *base[3:]),
        (*base[:4], True),
        (*base[:3], PositionTables(POSITIONS, rotary_tables=2), False),
        (*base[:3], PositionTables(POSITIONS, scales_queries=True), False),
    ]
    names = [cached(*arguments).name for arguments in [base, *others, base, *others]]
    assert asked == [base, *others]
    assert names == [str(number + 1) for number in range(len(asked))] * 2
    longer = cached(*base[:3], PositionTables(65), False)
    assert longer.name == "1" and [value.shape for value in longer.initializers.values()][:2] == [(65, 4)] * 2
    more = cached(*base[:3], PositionTables(65, rotary_tables=3), False)
    assert more.name == cached(*others[5]).name
    assert [value.shape for value in more.initializers.values()][:2] == [(3 * 65, 4)] * 2


def test_the_session_traces_by_way_of_the_cache() -> None:
    assert isinstance(tracing._export, CachedExport)


@pytest.mark.usefixtures("real_trace")
def test_tests_of_tracing_do_without_it() -> None:
    assert tracing._export is REAL
