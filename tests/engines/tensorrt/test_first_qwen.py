"""TensorRT-RTX compiles first-generation Qwen beyond its trained length, with the kernels that it has within."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_aot.engines.build import BuildReport, build_bundle
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.precisions import Precision
from qwen_aot.engines.spec.targets import Target
from tests.first_qwen import LAYERS, SEQ_LENGTH, save_folder
from tests.tools import require_package

require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
pytestmark = pytest.mark.trt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("first_qwen") / "checkpoint")


def build(checkpoint: Path, out: Path, precision: str, max_context: int) -> BuildReport:
    spec = BuildSpec(
        target=Target("tensorrt-rtx"),
        precision=Precision(precision),
        max_context=max_context,
        max_batch=2,
        prefill_chunk=32,
    )
    return build_bundle(checkpoint, spec, out)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tables_of_positions_cost_no_kernel_in_a_decode_layer(precision: str, checkpoint: Path, tmp_path: Path) -> None:
    """Weights are stored once, which the build checks: as queries apart from keys and values they weren't."""
    within = build(checkpoint, tmp_path / "within", precision, SEQ_LENGTH).manifest.engines.text
    beyond = build(checkpoint, tmp_path / "beyond", precision, 4 * SEQ_LENGTH).manifest.engines.text
    assert within.rotary_input is None and beyond.rotary_length == SEQ_LENGTH
    assert [tensor.name for tensor in beyond.inputs if tensor not in within.inputs][:1] == [
        f"rotary_offset.{SEQ_LENGTH}"
    ]
    assert within.plan is not None and beyond.plan is not None
    assert beyond.plan["decode"].layer_kernels == within.plan["decode"].layer_kernels
    assert len(beyond.plan["decode"].layer_kernels) == LAYERS
    assert beyond.plan["prefill"].kernels <= within.plan["prefill"].kernels + 1
    assert len(beyond.plan["prefill"].copies) == len(within.plan["prefill"].copies)
