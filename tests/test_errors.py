"""What ONNX Runtime raises is known by one list, whichever way a graph is refused or a step fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from qwen_aot.errors import onnxruntime_errors


def open_graph(text: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21, "x": 1]> {text}')
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


ADD = "g (float[2] a) => (float[2] b) { b = Add(a, a) }"


def _missing_file(folder: Path) -> None:
    onnxruntime.InferenceSession(folder / "none.onnx")


def _damaged_file(folder: Path) -> None:
    onnxruntime.InferenceSession(b"\x00\x01")


def _unknown_op(folder: Path) -> None:
    open_graph("g (float[2] a) => (float[2] b) { b = x.Nothing(a) }")


def _wrong_types(folder: Path) -> None:
    open_graph("g (float[2] a, int64[2] c) => (float[2] b) { b = Add(a, c) }")


def _no_kernel(folder: Path) -> None:
    open_graph("g (string[2] a) => (string[2] b) { b = Neg(a) }")


def _wrong_shape(folder: Path) -> None:
    open_graph(ADD).run(None, {"a": np.zeros(3, np.float32)})


def _shapes_that_do_not_meet(folder: Path) -> None:
    session = open_graph("g (float[n] a, float[m] c) => (float[k] b) { b = Add(a, c) }")
    session.run(None, {"a": np.zeros(3, np.float32), "c": np.zeros(2, np.float32)})


@pytest.mark.parametrize(
    "refused",
    [_missing_file, _damaged_file, _unknown_op, _wrong_types, _no_kernel, _wrong_shape, _shapes_that_do_not_meet],
)
def test_every_refusal_is_in_the_list(refused: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(onnxruntime_errors()) as caught:
        refused(tmp_path)
    assert type(caught.value) not in (Exception, ValueError, RuntimeError)


def test_the_list_has_nothing_of_python() -> None:
    assert {kind.__module__ for kind in onnxruntime_errors()} == {"onnxruntime.capi.onnxruntime_pybind11_state"}
    assert len(onnxruntime_errors()) >= 8
