"""Sessions of ONNX Runtime with one node of the library in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import helper, numpy_helper

DOMAIN = "qwen_aot.cpu"


def session_of(
    library: Path | None,
    op: str,
    inputs: Sequence[tuple[str, int, Sequence[int | str]] | None],
    outputs: Sequence[tuple[str, int, Sequence[int | str]]],
    attributes: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    domain: str = DOMAIN,
    threads: int = 1,
) -> onnxruntime.InferenceSession:
    """A session of one node.

    Args:
        library: of the kernels; None: the node is ONNX Runtime's own.
        op: the node's type.
        inputs: name, element type and shape of each in the node's order; None: absent.
        outputs: likewise.
        attributes: of the node.
        constants: which inputs are initializers.
        domain: of the node.
        threads: of the session.
    """
    node = helper.make_node(
        op,
        [entry[0] if entry else "" for entry in inputs],
        [name for name, *_ in outputs],
        domain=domain,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(*entry) for entry in inputs if entry and entry[0] not in constants],
        [helper.make_tensor_value_info(*entry) for entry in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


FLOAT, FLOAT16, INT8, INT64, UINT8 = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.INT8,
    onnx.TensorProto.INT64,
    onnx.TensorProto.UINT8,
)
