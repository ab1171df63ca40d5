"""What the nodes of a lowered graph are to a person: the layer they are of and the weights that they read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import onnx_ir as ir

_IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# What may stand between a weight and the product that reads it.
_VIEWS = ("Cast", "DequantizeLinear", "Gather", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_PRODUCTS = ("MatMul", "Gemm")
_STORED_AS = re.compile(r"_codes$")


class GraphNames:
    """Nodes of a lowered graph by the names that TensorRT tells of them.

    Args:
        graph: as model.onnx holds it.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._layers = _layers(graph)
        self._weights: dict[str, tuple[str, ...]] = {}
        self._products: dict[str, tuple[str, ...]] = {}
        self._shapes = {
            _matrix_name(value): value.shape.numpy()
            for value in graph.initializers.values()
            if value.shape is not None and _is_matrix(value)
        }
        for node in graph.all_nodes():
            found = tuple(dict.fromkeys(weight for value in node.inputs for weight in _behind_views(value)))
            self._weights[str(node.name)] = found
            if node.op_type in _PRODUCTS:
                self._products[str(node.name)] = found

    def layer(self, nodes: Iterable[str]) -> int | None:
        """The layer of a kernel that does those nodes: the one that it ends, where it begins another. None: of none."""
        return min((self._layers[node] for node in nodes if node in self._layers), default=None)

    def weights(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """Names of the matrices that any of those nodes reads."""
        return tuple(dict.fromkeys(name for node in nodes for name in self._weights.get(node, ())))

    def multiplied(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """Names of the matrices that a product among those nodes multiplies by."""
        return tuple(dict.fromkeys(name for node in nodes for name in self._products.get(node, ())))

    def shape(self, weight: str) -> tuple[int, ...]:
        """Of a matrix, [N, K], or of an expert each [E, ., .]."""
        return self._shapes[weight]


def _is_matrix(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) > 1 and not str(value.name).endswith("_scales")


def _matrix_name(value: ir.Value) -> str:
    return _STORED_AS.sub("", str(value.name))


def _layers(graph: ir.Graph) -> Mapping[str, int]:
    """Node -> layer. Nodes that a definition was inlined to have no number in their names; their neighbours have."""
    order = [str(node.name) for node in graph.all_nodes()]  # those of a branch behind the If that has it
    own = {name: int(found[1]) for name in order if (found := _IN_LAYER.search(name)) is not None}
    after: dict[str, int] = {}
    following: int | None = None
    for name in reversed(order):
        following = own.get(name, following)
        if following is not None:
            after[name] = following
    layers: dict[str, int] = {}
    before: int | None = None
    for name in order:
        before = own.get(name, before)
        if before is not None and after.get(name) == before:
            layers[name] = before
    return layers


def _behind_views(value: ir.Value | None) -> Iterable[str]:
    while value is not None:
        if value.is_initializer():
            if _is_matrix(value):
                yield _matrix_name(value)
            return
        node = value.producer()
        if node is None or node.op_type not in _VIEWS:
            return
        value = node.inputs[0]
