"""Facts of an ONNX file for `inspect`; its external data is not read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from qwen_aot.errors import BundleError


def facts(path: Path, *, list_tensors: bool) -> dict[str, Any]:
    """Opsets, inputs and outputs, ops and weights of a graph.

    Raises:
        BundleError: the file isn't ONNX, or holds no graph.
    """
    import onnx
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BundleError(f"{path} isn't an ONNX file: {error}") from error
    if not proto.HasField("graph"):  # as an empty file, which is a valid message of protobuf
        raise BundleError(f"{path} holds no graph ({path.stat().st_size} bytes): it isn't an ONNX file, or is cut off")
    model = ir.from_proto(proto)
    graph = model.graph
    ops = Counter((node.domain or "ai.onnx", node.op_type) for node in graph.all_nodes())
    weights = [tensor for value in graph.initializers.values() if (tensor := value.const_value) is not None]
    by_type: dict[str, tuple[int, int]] = {}
    for tensor in weights:
        count, total = by_type.get(tensor.dtype.name, (0, 0))
        by_type[tensor.dtype.name] = (count + 1, total + tensor.nbytes)
    result: dict[str, Any] = {
        "kind": "ONNX graph",
        "path": str(path),
        "producer": f"{model.producer_name or ''} {model.producer_version or ''}".strip(),
        "ir_version": model.ir_version,
        "opsets": dict(graph.opset_imports)
        | ({"ai.onnx": graph.opset_imports[""]} if "" in graph.opset_imports else {}),
        "metadata": dict(model.metadata_props),
        "nodes": sum(ops.values()),
        "local_functions": [f"{function.domain}.{function.name}" for function in model.functions.values()],
        "weight_bytes": sum(tensor.nbytes for tensor in weights),
        "io": [
            {
                "direction": direction,
                "name": value.name,
                "dtype": value.dtype.name if value.dtype is not None else None,
                "shape": [str(dim) for dim in value.shape] if value.shape is not None else None,
            }
            for direction, values in (("in", graph.inputs), ("out", graph.outputs))
            for value in values
        ],
        "weights": [
            {"dtype": name, "tensors": count, "bytes": total} for name, (count, total) in sorted(by_type.items())
        ],
        "ops": [{"domain": domain, "op": op, "count": count} for (domain, op), count in ops.most_common()],
    }
    result["opsets"].pop("", None)
    if list_tensors:
        result["tensors"] = [
            {
                "name": tensor.name,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape.numpy()),
                "bytes": tensor.nbytes,
            }
            for tensor in weights
        ]
    return result
