"""TensorRT-RTX compiles every form of a checkpoint's own codes, for a GPU that isn't here."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.own_codes import settled
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import check_weights
from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.storage import storage_of
from qwen_aot.runtime.bundle.load import load_bundle
from tests.coded_checkpoints import LINEAR, MOE, WHOLE_ROW, CodedCheckpoint, Coding
from tests.tools import require_package

require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
pytestmark = pytest.mark.trt
SPEC = BuildSpec(
    target=Target.TENSORRT_RTX,
    max_batch=2,
    max_context=192,
    prefill_chunk=64,
    tensorrt=TensorRtOptions(compute_capabilities=("8.9",)),
)


def every_form(name: str) -> Coding | None:
    """4 and 8 bits, zero points, minimums, blocks from 16 to 128, columns in order by a Gather and folded."""
    if not LINEAR.search(name):
        return None
    if "q_proj" in name or "v_proj" in name:
        return Coding(4, 128)
    if "k_proj" in name:
        return Coding(8, 128, offsets=True)
    if "o_proj" in name:
        return Coding(4, 32, zero_points=True, permuted="by tensor")
    return Coding(8, 16, permuted="by tensor") if "down" in name else Coding(4, 64, zero_points="up_proj" in name)


def test_every_form_is_compiled(tmp_path: Path) -> None:
    source = CodedCheckpoint(every_form, hidden=128, intermediate=256, layers=1)
    build_bundle(source, SPEC, tmp_path / "b")
    manifest = load_bundle(tmp_path / "b").manifest
    storage, text = storage_of(source), manifest.engines.text
    planned = footprint(source.config, settled(SPEC, storage), storage).weight_bytes
    assert text.tensorrt is not None and text.tensorrt.weight_bytes == pytest.approx(planned, rel=0.05)
    assert text.tensorrt.layers["DEQUANTIZE"] == 4  # q|k|v, o, gate|up, down
    assert text.quantization == {"own_codes": True, "quantize_head": False}
    assert text.plan is not None
    for step in text.plan.values():
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):  # that of 8 bits is two halves
            assert {product.right for product in step.matrix_products if product.name.endswith(name)} == {"int4"}
        assert step.weight_scratch == ()
    assert sum(text.weight_encodings.kept.values()) == len(source.coded)
    found = check_weights(tmp_path / "b", manifest, source)
    assert (found.verdict, found.compared) == (Verdict.PASSED, "hashes")
    name = "model.layers.0.self_attn.o_proj.weight"
    zeros = source.coded[name].zero_points
    assert zeros is not None
    zeros[3, 1] ^= 1
    found = check_weights(tmp_path / "b", manifest, source)
    assert found.differing == (f"{name}_offsets",)


def test_products_of_codes_are_compiled(tmp_path: Path) -> None:
    """W8A8: the network rounds each input once, and both sides of each product are codes behind a DequantizeLinear."""
    source = CodedCheckpoint(Coding(8, WHOLE_ROW, input_scale=0.0625), hidden=128, intermediate=256, layers=1)
    build_bundle(source, SPEC, tmp_path / "b")
    manifest = load_bundle(tmp_path / "b").manifest
    storage, text = storage_of(source), manifest.engines.text
    planned = footprint(source.config, settled(SPEC, storage), storage).weight_bytes
    assert text.tensorrt is not None and text.tensorrt.weight_bytes == pytest.approx(planned, rel=0.05)
    assert (text.tensorrt.layers["QUANTIZE"], text.tensorrt.layers["DEQUANTIZE"]) == (4, 8)
    assert text.plan is not None
    for step in text.plan.values():
        projections = [product for product in step.matrix_products if product.name.startswith("model.layers.")]
        assert {(product.left, product.right, product.output) for product in projections} == {
            ("int8", "int8", "float16")
        }
        assert sum(product.count for product in projections) == 4
        assert step.weight_scratch == ()
    assert sum(text.weight_encodings.kept.values()) == len(source.coded)
    assert check_weights(tmp_path / "b", manifest, source).verdict is Verdict.PASSED


def test_experts_in_codes_are_refused_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no experts with a checkpoint's own codes; accepted: target cpu, "):
        build_bundle(CodedCheckpoint(Coding(4, 32), moe=MOE), SPEC, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
