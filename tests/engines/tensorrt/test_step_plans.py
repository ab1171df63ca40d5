"""Plans made of program texts that are written here: each fact, and what must not count as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import pytest

from qwen_aot.engines.tensorrt.graph_names import GraphNames
from qwen_aot.engines.tensorrt.program_text import read_programs
from qwen_aot.engines.tensorrt.step_plans import step_plans, stored_bytes
from qwen_aot.errors import BuildError
from qwen_aot.runtime.bundle.manifest import MatrixProduct, PlanTensor, StepPlan
from tests.engines.tensorrt.programs import constant, function, fusion, packed, product, program, tensor

HALF = ir.DataType.FLOAT16
TENSORS = [
    tensor("input_ids.1", '{ 1 "s" }', "int64"),
    tensor("key_positions.1", '{ "w" }', "int64"),
    tensor("present.0.key.1", "{ 1 4 96 16 }", "half"),
    tensor("x", '{ 1 "s" 64 }', "half"),
    tensor("y", '{ 1 "s" 64 }', "half"),
    tensor("window", '{ 1 4 "w" 16 }', "half"),
    tensor("odd", '{ 1 "unknown" 64 }', "half"),
    tensor("ids", "{ 1 }", "int32"),
    tensor("wide", "{ 64 64 }", "half"),
    tensor("tall", "{ 64 64 }", "half"),
    tensor("exact", '{ 1 "s" 64 }', "float"),
    constant("w", "{ 64 64 }", "int8", 4096, place=0),
    constant("w_again", "{ 64 64 }", "int8", 4096, place=0),
    constant("v", "{ 64 64 }", "half", 8192, place=1),
    constant("table", "{ 96 16 }", "half", 3072, place=4),
    constant("scale", "{ 1 }", "half", 2, place=2),
]  # fmt: skip
SHAPES = {"input_ids": (1, 32), "key_positions": (96,)}


def graph() -> ir.Graph:
    """Two layers of a product each, as a lowering names them: inlined nodes have no layer in their names."""
    x = ir.Value(name="x", type=ir.TensorType(HALF), shape=ir.Shape([1, 64]))
    nodes, weights, value = [], [], x
    for layer in range(2):
        weight = ir.Value(
            name=f"model.layers.{layer}.mlp.down_proj.weight_codes", type=ir.TensorType(HALF), shape=ir.Shape([64, 64])
        )
        weights.append(weight)
        norm = ir.node("Cast", [value], {"to": HALF}, name=f"layers.{layer}.cast")
        floats = ir.node("DequantizeLinear", [weight, x], name=f"layers.{layer}.dequantize")
        turned = ir.node("Transpose", [floats.outputs[0]], name=f"node_{layer}0")
        multiply = ir.node("MatMul", [norm.outputs[0], turned.outputs[0]], name=f"node_{layer}1")
        add = ir.node("Add", [multiply.outputs[0], value], name=f"layers.{layer}.add")
        nodes += [norm, floats, turned, multiply, add]
        value = add.outputs[0]
    last = ir.node("Cast", [value], {"to": HALF}, name="node_last")
    return ir.Graph([x], last.outputs, nodes=[*nodes, last], initializers=weights)


def plan_of(tmp_path: Path, lines: Sequence[str], *fusions: str, layers: int = 2) -> StepPlan:
    path = tmp_path / "engine.rtx"
    path.write_bytes(b"".join(map(packed, (program(TENSORS, lines, is_step=True), *fusions))))
    return step_plans(read_programs(path), GraphNames(graph()), layers, {"prefill": SHAPES})["prefill"]


def onnx(*nodes: str) -> str:
    return "".join(f"[ONNX Layer: {node}]" for node in nodes)


def test_kernels_are_counted_by_layer(tmp_path: Path) -> None:
    lines = [
        "  shape_call={ name=\"a\" stream=0 layers=\"\" }",
        "  signal={ name=\"b\" stream=0 event=1 layers=\"\" }",
        function("__myl_Cast", ["x"], ["y"], onnx("layers.0.cast")),
        function("__myl_AddMul", ["x"], ["y"], onnx("layers.1.cast", "layers.0.add")),  # ends one, begins the next
        function("__myl_Add", ["x"], ["y"], onnx("node_11")),
        function("__myl_Exp", ["x"], ["y"], onnx("node_last")),
        function("__myl_Exp", ["x"], ["y"]),
    ]  # fmt: skip
    plan = plan_of(tmp_path, [" label bb1:", *lines])
    assert (plan.kernels, plan.layer_kernels) == (5, (2, 1))
    assert (plan.matrix_products, plan.copies, plan.weight_scratch) == ((), (), ())


@pytest.mark.parametrize("meeting", ["bb4", "bb9"], ids=["named", "merged with what follows"])
def test_of_branches_the_longer_one_counts(tmp_path: Path, meeting: str) -> None:
    kernel = function("__myl_Exp", ["x"], ["y"])
    jump = f'  jmp={{ name="j" stream=0 target={{{meeting} }} layers="" }}'
    lines = [" label bb1:", kernel, '  cjmp={ name="c" input={"x" } target={bb2 bb3 } layers="" }']
    lines += [" label bb2:", kernel, kernel, kernel, jump, " label bb3:", kernel, jump, " label bb4:", kernel]
    assert plan_of(tmp_path, lines).kernels == 5


def test_products_have_the_types_that_their_kernel_reads(tmp_path: Path) -> None:
    """Codes that a fused kernel widens are codes; a product behind a kernel that wrote the weight as fp16 is fp16."""
    inner = program(
        [*TENSORS, tensor("cast", "{ 64 64 }", "half"), tensor("scaled", "{ 64 64 }", "half")],
        [
            " label bb1:",
            '  cast={ name="a" output={"cast" } input={"w" } stream=0  layers="" }',
            '  mul={ name="b" output={"scaled" } input={"cast" "scale" } stream=0  layers="" }',
            product("c", "x", "scaled", "y"),
        ],
        is_step=False,
    )
    lines = [
        " label bb1:",
        fusion("__myl_CastMulFc", 0, ["w", "x"], ["y"], onnx("node_01", "node_00")),
        fusion("__myl_CastMulFc", 0, ["w", "x"], ["y"], onnx("node_11")),
        product("node_11", "x", "wide", "y", onnx("node_11")),
        function("_gemm_mha_v2", ["x", "window", "ids", "window"], ["y"]),
        function(
            "__myl_CastMulReshMulSum", ["w", "scale", "x"], ["y"], onnx("node_01", "layers.0.add")
        ),  # of one token
        function("__myl_Slic", ["wide"], ["y"], onnx("node_11")),  # cuts out what a product gave
        function("__myl_MulAdd", ["y", "table"], ["x"], onnx("node_11")),  # goes on with it
    ]
    down = "model.layers.*.mlp.down_proj.weight"
    assert plan_of(tmp_path, lines, inner).matrix_products == (
        MatrixProduct(down, "float16", "int8", "float16", 3),
        MatrixProduct(down.replace("*", "1"), "float16", "float16", "float16", 1),
        MatrixProduct("_gemm_mha_v2", "float16", "float16", "float16", 1),
    )


def test_a_fusion_without_a_product_is_none(tmp_path: Path) -> None:
    inner = program(TENSORS, [" label bb1:", '  add={ name="a" output={"y" } input={"x" } layers="" }'], is_step=False)
    plan = plan_of(tmp_path, [" label bb1:", fusion("__myl_Add", 0, ["x"], ["y"])], inner)
    assert (plan.kernels, plan.matrix_products) == (1, ())


def test_copies_are_what_only_moves_one_tensor(tmp_path: Path) -> None:
    lines = [
        " label bb1:",
        function("__myl_SlicMul", ["present.0.key.1", "scale"], ["window"], onnx("layers.0.cast")),
        function("__myl_TranGath", ["x", "ids"], ["y"], onnx("layers.1.add")),
        function("__myl_ReshTran", ["x"], ["odd"], onnx("node_last")),
    ]
    assert plan_of(tmp_path, lines).copies == (
        PlanTensor("present.0.key", "SlicMul", 4 * 96 * 16 * 2, 1),
        PlanTensor("layers.1.activations", "TranGath", 32 * 64 * 2, 1),
        PlanTensor("activations", "ReshTran", None, 1),
    )


@pytest.mark.parametrize(
    "kernel",
    [
        function("__myl_MulMul", ["x", "scale"], ["y"]),  # moves nothing
        function("__myl_SlicExp", ["x"], ["y"]),  # computes
        function("__myl_SlicEtc", ["x"], ["y"]),  # doesn't say what else
        function("__myl_ConcMove", ["x", "odd"], ["y"]),  # of two tensors
        function("__myl_Slic", ["x"], ["ids"]),  # of another type
        function("__myl_Slic", ["x"], ["y", "odd"]),  # a part of a larger kernel
    ],
)
def test_what_is_no_copy(tmp_path: Path, kernel: str) -> None:
    assert plan_of(tmp_path, [" label bb1:", kernel]).copies == ()


def test_weights_that_are_made_anew_are_scratch(tmp_path: Path) -> None:
    lines = [" label bb1:", function("__myl_CastMul", ["w", "scale"], ["wide"], onnx("layers.1.dequantize"))]
    lines += [function("__myl_CastGath", ["w", "ids"], ["wide"], onnx("node_last"))]
    assert plan_of(tmp_path, lines).weight_scratch == (
        PlanTensor("model.layers.1.mlp.down_proj.weight", "CastMul", 8192, 1),
        PlanTensor("weights", "CastGath", 8192, 1),
    )


@pytest.mark.parametrize(
    "kernel",
    [
        function("__myl_CastMul", ["w", "x"], ["wide"]),  # of activations too
        function("__myl_Gath", ["v", "ids"], ["y"]),  # rows of an embedding
        function("__myl_Cast", ["scale"], ["wide"]),  # of no matrix
        product("p", "v", "w", "wide"),
    ],
)
def test_what_is_no_scratch(tmp_path: Path, kernel: str) -> None:
    assert plan_of(tmp_path, [" label bb1:", kernel]).weight_scratch == ()


def test_each_matrix_that_a_kernel_writes_is_scratch(tmp_path: Path) -> None:
    line = function("__myl_CastTran", ["w", "v"], ["wide", "tall"], onnx("layers.0.dequantize"))
    assert plan_of(tmp_path, [" label bb1:", line]).weight_scratch == (
        PlanTensor("model.layers.0.mlp.down_proj.weight", "CastTran", 8192, 2),
    )


def test_of_several_outputs_the_product_is_the_one_of_its_width(tmp_path: Path) -> None:
    def written(*outputs: str) -> tuple[MatrixProduct, ...]:
        kernel = function("__myl_CastMulReshMulSum", ["w", "x"], outputs, onnx("node_01"))
        return plan_of(tmp_path, [" label bb1:", kernel]).matrix_products

    down = "model.layers.0.mlp.down_proj.weight"
    assert written("window", "exact") == (MatrixProduct(down, "float16", "int8", "float32", 1),)
    assert written("window", "ids") == ()  # none is as wide


def test_a_constant_that_two_names_have_is_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "engine.rtx"
    path.write_bytes(packed(program(TENSORS, [" label bb1:"], is_step=True)))
    assert stored_bytes(read_programs(path)) == 4096 + 8192 + 3072 + 2


def test_programs_of_other_profiles_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "engine.rtx"
    path.write_bytes(packed(program(TENSORS, [" label bb1:"], is_step=True)))
    with pytest.raises(BuildError, match=r"holds 1 programs of steps for the profiles \['prefill', 'decode'\]"):
        step_plans(read_programs(path), GraphNames(graph()), 2, {"prefill": SHAPES, "decode": SHAPES})


def test_a_type_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    line = product("p", "input_ids.1", "w", "y")
    with pytest.raises(BuildError, match=r"the program of the prefill profile can't be read: KeyError\('int64'\)"):
        plan_of(tmp_path, [" label bb1:", line])


def test_layers_are_told_by_neighbours() -> None:
    names = GraphNames(graph())
    assert names.layer(["node_01"]) == 0
    assert names.layer(["node_11", "node_last"]) == 1
    assert names.layer(["node_last"]) is None
    assert names.layer([]) is None
    assert names.multiplied(["layers.0.dequantize"]) == ()
    assert names.weights(["layers.0.dequantize"]) == ("model.layers.0.mlp.down_proj.weight",)
