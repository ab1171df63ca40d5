"""Repeats traced layers: a graph with one layer of each kind becomes the graph of the whole model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import onnx_ir as ir

from qwen_aot.errors import ExportError
from qwen_aot.exporter.graph import ops
from qwen_aot.exporter.model.io_spec import TensorSpec

_LAYER_SCOPE = re.compile(r"layers\.(\d+)")
_TEMPLATE_NAME = re.compile(r"^layers\.(\d+)\.")


class LayerRepeater:
    """Copies parts of a traced graph into a new one; which parts, and how often, the user says.

    Args:
        traced: what torch gave.
        num_templates: how many layers it has.
        inputs: of the new graph.
        initializer_name: a parameter of the traced module, of a layer with the layer's own index -> the name of its
            recipe.

    Attributes:
        values: traced value -> its copy: of what stands before the layers, then of the last layer copied.
    """

    def __init__(
        self,
        traced: ir.Graph,
        num_templates: int,
        inputs: Sequence[TensorSpec],
        initializer_name: Callable[[str], str],
    ) -> None:
        self._traced = traced
        self._num_templates = num_templates
        self._initializer_name = initializer_name
        self._inputs = {spec.name: _value(spec) for spec in inputs}
        self._initializers: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self.values: dict[ir.Value, ir.Value] = {}

    def partition(self) -> tuple[list[ir.Node], list[list[ir.Node]], list[ir.Node]]:
        """Nodes before, in and after the layers, by the module scope that torch recorded.

        Raises:
            ExportError: it recorded none.
        """
        before: list[ir.Node] = []
        after: list[ir.Node] = []
        layers: list[list[ir.Node]] = [[] for _ in range(self._num_templates)]
        for node in self._traced:
            match = _LAYER_SCOPE.search(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
            if match is not None:
                layers[int(match[1])].append(node)
            elif any(layers):
                after.append(node)
            else:
                before.append(node)
        if not all(layers):
            raise ExportError("torch.onnx.export recorded no module scope for a layer; is this the pinned torch?")
        return before, layers, after

    def residual_stream(self, nodes: list[ir.Node], width: int) -> ir.Value:
        """The value a layer takes from what stands before it: its only input from another node as wide as the model.

        The factors of q, k and v, which every layer of a decoder may take too, are as wide as these.

        Raises:
            ExportError: it takes more, or nothing.
        """
        made = {value for node in nodes for value in node.outputs}
        taken = {value for node in nodes for value in node.inputs if value is not None and value not in made}
        streams = [value for value in taken if value.producer() is not None and _is_stream(value, width)]
        if len(streams) != 1:
            names = sorted(str(value.name) for value in streams)
            raise ExportError(f"a traced layer should take the residual stream and nothing else, but takes {names}")
        return streams[0]

    def bind(self, traced_input: str, name: str) -> None:
        """Lets an input of the traced graph be one of the new graph."""
        traced = next(value for value in self._traced.inputs if value.name == traced_input)
        self.values[traced] = self._inputs[name]

    def copy(self, nodes: list[ir.Node], prefix: str, layer: int | None = None) -> None:
        """Appends copies of `nodes`; their results are remembered under the traced values."""
        for node in nodes:
            inputs = [None if value is None else self._input(value, layer) for value in node.inputs]
            outputs = []
            for value in node.outputs:
                copy = ir.Value(name=f"{prefix}{value.name}", type=value.type, shape=_copy_shape(value))
                self.values[value] = copy
                outputs.append(copy)
            self._nodes.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    list(node.attributes.values()),
                    outputs=outputs,
                    overload=ops.overload_of(ops.Op(node.op_type), len(inputs)) if node.domain == ops.DOMAIN else "",
                    name=f"{prefix}{node.name}",
                )
            )

    def name_output(self, index: int, spec: TensorSpec) -> ir.Value:
        """The copy of the traced graph's output, named and shaped as a specification has it."""
        value = self.values[self._traced.outputs[index]]
        value.name, value.shape = spec.name, ir.Shape(spec.dims)
        return value

    def graph(self, outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        """What was copied."""
        return ir.Graph(
            list(self._inputs.values()),
            list(outputs),
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": ops.OPSET, ops.DOMAIN: ops.VERSION},
            name=name,
        )

    def _input(self, value: ir.Value, layer: int | None) -> ir.Value:
        if not value.is_initializer():
            return self.values[value]
        assert value.name is not None
        name = self._initializer_name(_TEMPLATE_NAME.sub(f"layers.{layer}.", value.name))
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=value.type, shape=_copy_shape(value), const_value=value.const_value
            )
        return self._initializers[name]


def _is_stream(value: ir.Value, width: int) -> bool:
    if value.dtype is None or not value.dtype.is_floating_point():
        return False
    return value.shape is not None and value.shape[-1] == width


def _copy_shape(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape(list(value.shape))


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, type=ir.TensorType(spec.dtype), shape=ir.Shape(spec.dims))
