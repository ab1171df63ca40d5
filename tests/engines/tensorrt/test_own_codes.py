"""TensorRT-RTX compiles every form of a checkpoint's own codes, for a GPU that isn't here."""

from __future__ import annotations

import importlib
import re
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest

from qwen_aot.engines.build import build_bundle
from qwen_aot.engines.planner.footprint import footprint
from qwen_aot.engines.spec.build_spec import BuildSpec
from qwen_aot.engines.spec.own_codes import settled
from qwen_aot.engines.spec.targets import Target
from qwen_aot.engines.spec.tensorrt_options import TensorRtOptions
from qwen_aot.engines.tensorrt.program_text import read_programs
from qwen_aot.engines.verify.verdict import Verdict
from qwen_aot.engines.verify.weights import check_weights
from qwen_aot.errors import BuildError, ExportError
from qwen_aot.exporter.checkpoint.encoding import CodeType
from qwen_aot.exporter.checkpoint.storage import storage_of
from qwen_aot.runtime.bundle.load import load_bundle
from tests.coded_checkpoints import LINEAR, MOE, WHOLE_ROW, CodedCheckpoint, Coding
from tests.tools import require_package

require_package("tensorrt_rtx", "pip install 'qwen-aot[tensorrt-rtx]'")
pytestmark = pytest.mark.trt
WORDS = {CodeType.INTEGER: "int8", CodeType.E4M3: "fp8_e4m3"}  # an engine's own


def spec_of(rows: int, *capabilities: str) -> BuildSpec:
    return BuildSpec(
        target=Target.TENSORRT_RTX,
        max_batch=rows,
        max_context=192,
        prefill_chunk=64,
        tensorrt=TensorRtOptions(compute_capabilities=capabilities or ("8.9",)),
    )


SPEC = spec_of(2)


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


@pytest.mark.parametrize(("code_type", "read"), [(CodeType.INTEGER, "int8"), (CodeType.E4M3, "float8_e4m3")])
@pytest.mark.parametrize(("rows", "capability"), [(1, "12.0"), (2, "8.9")])
def test_products_of_codes_are_compiled(
    code_type: CodeType, read: str, rows: int, capability: str, tmp_path: Path
) -> None:
    """W8A8: the network rounds each input once, and both sides of each product are codes behind a DequantizeLinear."""
    coding = Coding(8, WHOLE_ROW, input_scale=0.0625, code_type=code_type)
    source = CodedCheckpoint(coding, hidden=128, intermediate=256, layers=1)
    build_bundle(source, spec_of(rows, capability), tmp_path / "b")
    manifest = load_bundle(tmp_path / "b").manifest
    storage, text = storage_of(source), manifest.engines.text
    planned = footprint(source.config, settled(SPEC, storage), storage).weight_bytes
    assert text.tensorrt is not None and text.tensorrt.weight_bytes == pytest.approx(planned, rel=0.05)
    assert (text.tensorrt.layers["QUANTIZE"], text.tensorrt.layers["DEQUANTIZE"]) == (4, 8)
    assert text.plan is not None
    for step in text.plan.values():
        projections = [product for product in step.matrix_products if product.name.startswith("model.layers.")]
        assert {(product.left, product.right, product.output) for product in projections} == {(read, read, "float16")}
        assert sum(product.count for product in projections) == 4
        assert step.weight_scratch == ()
    assert sum(text.weight_encodings.kept.values()) == len(source.coded)
    assert check_weights(tmp_path / "b", manifest, source).verdict is Verdict.PASSED
    name = "model.layers.0.self_attn.o_proj.weight"
    source.coded[name].codes[3, 1] ^= 1
    assert check_weights(tmp_path / "b", manifest, source).differing == (f"{name}_codes",)
    scaled = by_what_products_are_multiplied(tmp_path / "b" / "engine.rtx", WORDS[code_type])
    units = {CodeType.INTEGER: 2.0**-12, CodeType.E4M3: 2.0**-14}
    assert scaled == {0.0625 * units[code_type]}


@pytest.mark.parametrize(("code_type", "read"), [(CodeType.INTEGER, "int8"), (CodeType.E4M3, "float8_e4m3")])
def test_products_of_codes_beside_experts_in_fp16_are_compiled(code_type: CodeType, read: str, tmp_path: Path) -> None:
    """W8A8 of a mixture of experts as `quantize` makes it: the plan names both, and what each reads."""

    def all_but_experts(name: str) -> Coding | None:
        coding = Coding(8, WHOLE_ROW, input_scale=0.0625, code_type=code_type)
        return coding if LINEAR.search(name) and ".experts." not in name else None

    moe = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    source = CodedCheckpoint(all_but_experts, hidden=128, layers=1, moe=moe)
    build_bundle(source, SPEC, tmp_path / "b")
    text, storage = load_bundle(tmp_path / "b").manifest.engines.text, storage_of(source)
    planned = footprint(source.config, settled(SPEC, storage), storage).weight_bytes
    assert text.tensorrt is not None and text.tensorrt.weight_bytes == pytest.approx(planned, rel=0.05)
    assert text.precision == {CodeType.INTEGER: "int8", CodeType.E4M3: "fp8"}[code_type]
    assert text.plan is not None
    read_by = {
        "self_attn.qkv_proj.weight": read,
        "self_attn.o_proj.weight": read,
        "mlp.shared_expert.gate_up_proj.weight": read,
        "mlp.shared_expert.down_proj.weight": read,
        "mlp.experts_gate_up": "float16",
        "mlp.experts_down": "float16",
    }
    for step in text.plan.values():
        products = {each.name.removeprefix("model.layers.0."): each for each in step.matrix_products}
        for name, wanted in read_by.items():
            assert (products[name].left, products[name].right) == (wanted, wanted)


def test_sums_of_codes_are_not_written_unscaled(tmp_path: Path) -> None:
    """The negative control: a row's scales in front of the product are moved behind it, where fp16 has overflowed."""
    rng = np.random.default_rng(0)
    nodes = """
        xq = QuantizeLinear(x, xs, zero)
        xd = DequantizeLinear(xq, xs, zero)
        wd = DequantizeLinear<axis = 0>(w, ws)
        wt = Transpose<perm = [1, 0]>(wd)
        y = MatMul(xd, wt)
    """
    text = f'<ir_version: 10, opset_import: ["": 23]> g (float16[B, S, 256] x) => (float16[B, S, 512] y) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    for name, array in {
        "xs": np.array(0.0625, np.float16),
        "zero": np.zeros((), np.int8),
        "w": rng.integers(-127, 128, (512, 256), np.int8),
        "ws": np.full(512, 2.0**-11, np.float16),
    }.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    (tmp_path / "engine.rtx").write_bytes(compiled(model))
    assert by_what_products_are_multiplied(tmp_path / "engine.rtx", "int8") == {1.0}


def by_what_products_are_multiplied(engine: Path, dtype: str) -> set[float]:
    """Alpha of every fully_connected call whose inputs are codes: what a sum is multiplied by before it is written."""
    found: set[float] = set()
    inputs = {
        call.name: [program.tensors[name].dtype for name in call.inputs]
        for program in read_programs(engine)
        for call in program.calls
        if call.op == "fully_connected"
    }
    for name, alpha in re.findall(rb'fully_connected=\{ name="([^"]+)".*? alpha=([0-9A-F]{8}) ', engine.read_bytes()):
        if inputs[name.decode()][:2] == [dtype, dtype]:
            found.add(struct.unpack(">f", bytes.fromhex(alpha.decode()))[0])
    return found


def compiled(model: onnx.ModelProto) -> bytes:
    """An engine for SM 8.9 of a graph with one input [B, S, K]."""
    trt = importlib.import_module("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(model.SerializeToString())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, 256), (1, 64, 256), (1, 64, 256))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


def test_experts_in_codes_are_refused_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no experts with a checkpoint's own codes; accepted: target cpu, "):
        build_bundle(CodedCheckpoint(Coding(4, 32), moe=MOE), SPEC, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_e4m3_is_refused_where_it_has_no_products(tmp_path: Path) -> None:
    source = CodedCheckpoint(Coding(8, WHOLE_ROW, input_scale=0.0625, code_type=CodeType.E4M3))
    with pytest.raises(
        BuildError, match=r"fp8 needs compute capability 8\.9 or later, and 8\.6 is asked for; leave it"
    ):
        build_bundle(source, spec_of(1, "8.6", "8.9"), tmp_path / "b")
    for target in (Target.CPU, Target.CUDA):
        message = (
            rf"W8A8 of E4M3 floats\), and target {target} has none; accepted: target tensorrt-rtx, tensorrt; or prec"
        )
        with pytest.raises(BuildError, match=message):
            build_bundle(source, BuildSpec(target=target, max_context=64), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    found = settled(BuildSpec(target=Target.TENSORRT_RTX), storage_of(source))
    assert (found.precision, found.compute_capabilities) == ("fp8", ("8.9", "12.0"))
