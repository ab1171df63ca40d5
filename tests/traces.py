"""torch.onnx.export run once a session for each decoder, in place of once a build: about 3 CPU seconds each.

How many positions the tables have, and how many rotary tables there are, is their shape and nothing else of what is
traced, so that traces which differ in it alone are one.

Cached is what torch gives (`exporter.graph.trace._export`: a few template layers) and nothing of ours: graphs are
repeated, named and given their definitions and recipes anew at each call of `trace`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from qwen_aot.exporter.graph import trace
from qwen_aot.exporter.model.position_tables import PositionTables
from tests.shared import once

POSITIONS = 512  # that are traced
_ROTARY = ("rotary_cos", "rotary_sin")

Export = Callable[..., ir.Graph]
REAL: Export = trace._export
# torch reads its library of ONNX functions at each export, a quarter of its time, and changes nothing in it.
_torchlib = functools.cache(ONNXRegistry.from_torchlib)


class CachedExport:
    """`_export` by way of a folder; each call gives a graph of its own."""

    def __init__(self, folder: Path, export: Export = REAL) -> None:
        self._folder = folder
        self._export = export

    def __call__(
        self, config: object, dtype: object, templates: object, tables: PositionTables, speculates: bool
    ) -> ir.Graph:
        traced = PositionTables(POSITIONS, min(tables.rotary_tables, 2), tables.scales_queries)
        arguments = (config, dtype, templates, traced, speculates)
        key = hashlib.sha256(repr(arguments).encode()).hexdigest()[:32]

        def make(_: Path) -> ir.Graph:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(_torchlib))
                graph = self._export(config, dtype, templates, traced, speculates)
            graph = graph.clone()  # of plain values, in place of torch's own kinds
            for value in graph.initializers.values():
                value.const_value = None  # a fake tensor, which holds no numbers
            for owner in (graph, *graph, *graph.inputs, *graph.initializers.values(), *_results(graph)):
                owner.meta.clear()  # torch's own objects, which nobody reads
            return graph

        graph: ir.Graph = once(self._folder / key, make)
        rows = dict.fromkeys(_ROTARY, tables.rotary_rows)
        if tables.scales_queries:
            rows["query_scales"] = tables.positions
        for name, count in rows.items():
            table = graph.initializers[name]
            assert table.shape is not None
            table.shape = ir.Shape([count, *list(table.shape)[1:]])
        return graph


def _results(graph: ir.Graph) -> list[ir.Value]:
    return [value for node in graph for value in node.outputs]
