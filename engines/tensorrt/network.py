"""From model.onnx to TensorRT's network: parsing it, and what it says about itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_aot.engines.tensorrt.messages import failure
from qwen_aot.errors import BuildError
from qwen_aot.exporter.model.io_spec import TensorSpec
from qwen_aot.runtime.bundle.manifest import IoTensor

# TensorRT's names of element types -> ours.
_DTYPES: Mapping[str, str] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
}


@dataclass(frozen=True, slots=True)
class Contract:
    """What a network may have for inputs and outputs, in this order; an input that nothing reads may be missing."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]


# Beside the cache: what no network can do without. Others are missing where nothing reads them.
_NEEDED = (
    *("input_ids", "logits", "logits_positions", "last_logits"),
    *("image_embeddings", "image_positions", "pixels"),
)


def parse(trt: Any, builder: Any, logger: Any, graph: Path, title: str) -> Any:
    """Reads the graph and maps its weights into a new, strongly typed network.

    Raises:
        BuildError: the parser refuses it; names the node.
    """
    # From TensorRT 11 on there are no others, and so no flag.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise failure(title, "parse the graph", [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)])
    return network


def _parser_error(error: Any) -> str:
    node = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{error.code().name}{f' at {node}' if node else ''}: {error.desc()}"


def io_tables(network: Any, contract: Contract, title: str) -> tuple[tuple[IoTensor, ...], tuple[IoTensor, ...]]:
    """Inputs and outputs as the network has them, with the contract's letters for its dynamic dimensions.

    Raises:
        BuildError: the network isn't what the exporter's contract says (an input that nothing reads may be missing).
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return _table(inputs, contract.inputs, title), _table(outputs, contract.outputs, title)


def _table(tensors: Sequence[Any], contract: Sequence[TensorSpec], title: str) -> tuple[IoTensor, ...]:
    specs = {spec.name: spec for spec in contract}
    table = []
    for tensor in tensors:
        dtype, shape = _DTYPES.get(tensor.dtype.name, tensor.dtype.name), tuple(tensor.shape)
        spec = specs.get(tensor.name)
        expected = spec and (str(spec.dtype.numpy()), tuple(-1 if isinstance(dim, str) else dim for dim in spec.dims))
        if spec is None or (dtype, shape) != expected:
            raise BuildError(
                f"{title} reads {tensor.name} as {dtype} {list(shape)}, and the contract says {expected}; "
                "please report it"
            )
        table.append(IoTensor(tensor.name, dtype, spec.dims))
    found = [tensor.name for tensor in tensors]
    if found != [spec.name for spec in contract if spec.name in found]:
        raise BuildError(f"{title} has the inputs or outputs in another order: {', '.join(found)}; please report it")
    needed = [spec.name for spec in contract if "." in spec.name or spec.name in _NEEDED]
    if missing := [name for name in needed if name not in found]:
        raise BuildError(f"{title} lacks the inputs or outputs {', '.join(missing)}; please report it")
    return tuple(table)


def layer_counts(network: Any) -> dict[str, int]:
    """How many layers of each type the network has, the most frequent first."""
    types = Counter(network.get_layer(index).type.name for index in range(network.num_layers))
    return dict(types.most_common())


def allow_decomposed_attention(trt: Any, network: Any) -> int:
    """Lets attention that no fused kernel takes be compiled as several kernels. Returns the number of layers.

    With a fused kernel the engine is the same. Without leave, TensorRT refuses the whole network: attention in fp32,
    and attention after a mixture of experts' `If`.
    """
    attention = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # none before 10.15, which plugins can do without
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == attention:
            layer.__class__ = trt.IAttentionInputLayer  # Python sees a plain ILayer until it is told
            layer.attention.decomposable = True
            count += 1
    return count
