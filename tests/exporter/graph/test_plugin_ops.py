"""The definitions of QwenGQA, QwenMoE and QwenLinear, run by ONNX Runtime, against the references of the kernels.

Inputs are poisoned as the kernels' tests poison them: NaN in padding and in every unused cache slot.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from qwen_aot.exporter.graph.ops import DOMAIN, VERSION
from qwen_aot.exporter.graph.plugin_ops import (
    ATTRIBUTES,
    OPSET,
    PluginOp,
    gqa_definition,
    is_plugin,
    linear_overload,
    linear_plugin_definition,
    moe_definition,
)
from tests.plugins.gqa_cases import GqaStep
from tests.plugins.linear_cases import LinearStep
from tests.plugins.moe_cases import MoeStep

_ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}
# Of elements near 1. Both sides compute the same fp32 sums in another order, then round to the type alike: a rounding
# may fall on the other side, by one unit in the last place (2^-10 and 2^-7 between 1 and 2).
BOUNDS = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def run(
    definition: ir.Function,
    attributes: dict[str, int | float],
    inputs: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """One node with its definition on ONNX Runtime; `outputs` give types and shapes."""
    op = definition.name
    assert list(inputs) == [value.name for value in definition.inputs]
    assert list(outputs) == [value.name for value in definition.outputs]
    infos = [
        [onnx.helper.make_tensor_value_info(name, _ONNX_TYPES[tensor.dtype], tensor.shape) for name, tensor in group]
        for group in (inputs.items(), outputs.items())
    ]
    node = onnx.helper.make_node(
        op, list(inputs), list(outputs), domain=DOMAIN, overload=definition.overload, **attributes
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "step", *infos),
        functions=[ir.serde.serialize_function(definition)],
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    results = {name: torch.empty_like(tensor) for name, tensor in outputs.items()}
    for group, bind in ((inputs, binding.bind_input), (results, binding.bind_output)):
        for name, tensor in group.items():
            bind(name, "cpu", 0, _ONNX_TYPES[tensor.dtype], list(tensor.shape), tensor.contiguous().data_ptr())
    session.run_with_iobinding(binding)
    return results


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(
        actual.float().numpy(), expected.float().numpy(), atol=BOUNDS[expected.dtype], rtol=BOUNDS[expected.dtype]
    )


def run_gqa(step: GqaStep) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in step.tensors.items() if tensor is not None}
    names = ["qkv", "key", "value", "cos", "sin", "position_ids", "cache_length", "new_tokens"]
    scales = ["key_scale", "value_scale"] if step.is_int8 else []
    names += [*scales, *(["q_norm", "k_norm"] if step.has_norms else [])]
    inputs = {{"key": "past_key", "value": "past_value"}.get(name, name): tensors[name] for name in names}
    qkv = tensors["qkv"]
    outputs = {"attention": torch.empty(*qkv.shape[:2], step.num_heads * step.head_dim, dtype=qkv.dtype)}
    outputs |= {f"present_{name}": tensors[name] for name in ("key", "value")}
    outputs |= {f"present_{name}": tensors[name] for name in scales}
    attributes = {
        "num_heads": step.num_heads,
        "num_kv_heads": step.num_kv_heads,
        "head_dim": step.head_dim,
        "scale": step.scale,
    }
    attributes["norm_epsilon"] = step.norm_epsilon
    definition = gqa_definition(**attributes, int8_cache=step.is_int8)
    return run(definition, attributes | {"cache_bits": 8 if step.is_int8 else 16}, inputs, outputs)


STEPS = {
    "prefill": GqaStep([(0, 7)], 7),
    "unequal rows": GqaStep([(5, 9), (0, 3), (17, 1)], 9),
    "idle rows": GqaStep([(5, 0), (0, 3), (4, 4)], 4, group=3),
    "decode": GqaStep([(31, 1), (1, 1), (6, 0)], 1, group=5, num_kv_heads=1),
    "a full cache": GqaStep([(12, 4)], 4, capacity=16),
    "nothing to do": GqaStep([(3, 0), (2, 0)], 2),
    "norms of heads": GqaStep([(5, 9), (0, 3)], 9, group=2, has_norms=True),
}


@pytest.mark.parametrize("is_int8", [False, True], ids=["same", "int8"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", STEPS)
def test_gqa_equals_the_kernels_reference(name: str, dtype: str, is_int8: bool) -> None:
    base = STEPS[name]
    step = GqaStep(
        base.lengths,
        base.steps,
        dtype,
        is_int8,
        base.has_norms,
        head_dim=16,
        num_kv_heads=base.num_kv_heads,
        group=base.group,
        capacity=base.capacity,
        seed=len(name),
    )
    got, want = run_gqa(step), step.expected()
    assert_near(got["attention"], want["output"])
    for part in ("key", "value"):
        if is_int8:
            difference = (got[f"present_{part}"].int() - want[part].int()).abs()
            assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3  # a rounding on its edge
            # Sums of a norm in another order move a scale by a step of fp16 at most.
            step_of_scale = 2.0**-10 if base.has_norms else 0
            scales = (got[f"present_{part}_scale"], want[f"{part}_scale"])
            np.testing.assert_allclose(*scales, rtol=step_of_scale, atol=0)
        else:
            assert_near(got[f"present_{part}"], want[part])


def test_gqa_gives_zeros_for_padding() -> None:
    got = run_gqa(GqaStep([(5, 2), (3, 0)], 4, head_dim=16))["attention"]
    assert (got[0, 2:] == 0).all() and (got[1] == 0).all() and (got[0, :2] != 0).any()


def run_moe(step: MoeStep) -> torch.Tensor:
    """The hidden states as [1, T, M]."""
    weights = {"gate_up": step.gate_up, "down": step.down}
    inputs = {name: tensor.unsqueeze(0) for name, tensor in step.tensors.items()}
    inputs |= {name: matrix.codes for name, matrix in weights.items()}
    for part in ("scale", "zero"):
        found = {f"{name}_{part}": getattr(matrix, part) for name, matrix in weights.items()}
        inputs |= {name: tensor for name, tensor in found.items() if tensor is not None}
    has_zeros = step.gate_up.zero is not None
    attributes = {
        "num_experts": step.num_experts,
        "experts_per_token": step.tensors["expert_ids"].shape[1],
        "weight_bits": step.gate_up.bits,
        "has_zeros": int(has_zeros),
    }
    definition = moe_definition(
        hidden_size=step.hidden_size,
        intermediate_size=step.inner_size,
        num_experts=step.num_experts,
        experts_per_token=attributes["experts_per_token"],
        weight_bits=step.gate_up.bits,
        has_zeros=has_zeros,
    )
    return run(definition, attributes, inputs, {"y": torch.empty_like(inputs["hidden"])})["y"][0]


@pytest.mark.parametrize("form", ["16", "8", "4", "4z"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("num_tokens", "routing"), [(1, "random"), (9, "same"), (21, "skip")])
def test_moe_equals_the_kernels_reference(num_tokens: int, routing: str, dtype: str, form: str) -> None:
    step = MoeStep(num_tokens, dtype=dtype, form=form, routing=routing, hidden_size=256, inner_size=128, seed=3)
    assert_near(run_moe(step), step.expected())


@pytest.mark.parametrize(
    "expert_ids",
    [[[0, 4], [-1, 7], [3, 5]], [[-1, 9]]],
    ids=["some outside", "all outside"],
)
def test_moe_counts_choices_outside_as_zero(expert_ids: list[list[int]]) -> None:
    ids = torch.tensor(expert_ids, dtype=torch.int32)
    step = MoeStep(len(ids), expert_ids=ids, form="8")
    got = run_moe(step)
    assert_near(got, step.expected())
    assert (got[[all(not 0 <= i < 5 for i in row) for row in expert_ids]] == 0).all()


@pytest.mark.parametrize(
    ("form", "group_size"),
    [("8", -1), ("8", 128), ("4", -1), ("4", 32), ("4", 128), ("4z", -1), ("4z", 64), ("4z", 128)],
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_linear_equals_the_kernels_reference(form: str, group_size: int, has_bias: bool, dtype: str) -> None:
    step = LinearStep(6, rows=48, columns=256, dtype=dtype, form=form, group_size=group_size, has_bias=has_bias)
    weights, has_zeros = step.weights, form == "4z"
    inputs = {"x": step.tensors["x"].view(2, 3, -1), "weight": weights.codes, "scale": weights.scale}
    if weights.zero is not None:
        inputs["zero"] = weights.zero
    if has_bias:
        inputs["bias"] = step.tensors["bias"]
    forms = {"weight_bits": weights.bits, "has_zeros": has_zeros, "has_bias": has_bias}
    definition = linear_plugin_definition(**forms)
    assert definition.overload == linear_overload(**forms)
    attributes = {"weight_bits": weights.bits, "group_size": group_size, "has_zeros": int(has_zeros)}
    outputs = {"y": torch.empty(2, 3, 48, dtype=inputs["x"].dtype)}
    got = run(definition, attributes | {"has_bias": int(has_bias)}, inputs, outputs)["y"]
    assert_near(got.view(6, 48), step.expected())


def test_attributes_are_the_definitions() -> None:
    gqa = gqa_definition(num_heads=2, num_kv_heads=1, head_dim=8, scale=0.5)
    moe = moe_definition(hidden_size=8, intermediate_size=8, num_experts=2, experts_per_token=1)
    linear = linear_plugin_definition(weight_bits=4, has_zeros=True, has_bias=True)
    for op, definition in ((PluginOp.GQA, gqa), (PluginOp.MOE, moe), (PluginOp.LINEAR, linear)):
        assert (definition.domain, definition.name) == (DOMAIN, op)
        assert tuple(definition.attributes) == ATTRIBUTES[op]
        assert is_plugin(ir.node(op, [], domain=DOMAIN)) and not is_plugin(ir.node(op, []))
