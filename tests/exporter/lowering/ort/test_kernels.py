"""The graph for own CPU kernels: what is replaced and what isn't, and whole quantized models against transformers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_beside, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.lowering.ort.int8_cache import scale_names
from qwen_aot.exporter.lowering.ort.kernels import CPU_DOMAIN, CPU_OPS_VERSION, Replaced, use_kernels
from qwen_aot.exporter.lowering.ort.provider import Provider
from qwen_aot.exporter.quantize.blockwise import BlockFormat, dequantize, quantize
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from qwen_aot.runtime.backends.cpu.kernels import OPS_VERSION
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.cases import CASES
from tests.exporter.graph.test_trace import DENSE, MOE
from tests.exporter.stepper import Stepper

HEADS_OF_16 = dataclasses.replace(DENSE, head_dim=16, hidden_size=64)  # whole blocks: no Split behind the embedding
INT4, INT8 = BlockFormat(4, 32), BlockFormat(8, 32)
FLOAT, FLOAT16, CODES = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8


def lowered(config: Any = HEADS_OF_16, **options: Any) -> Traced:
    return ort.lower(trace(config), OrtOptions(**options))


def counts(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


# --- what is replaced


def test_every_projection_and_every_attention() -> None:
    traced = lowered(weights=INT4)
    graph, layers = traced.model.graph, HEADS_OF_16.num_hidden_layers
    before, tensors = counts(graph), set(graph.initializers)
    ends = [[value.name for value in values] for values in (graph.inputs, graph.outputs)]
    assert use_kernels(traced.model, FLOAT16) == Replaced(before["MatMulNBits"], layers)
    found = counts(graph)
    assert (found["QwenLinear"], found["QwenGQA"]) == (4 * layers + 1, layers)
    assert not found.keys() & {"MatMulNBits", "GroupQueryAttention", "Split", "QuickGelu"}
    assert found["Mul"] == 0  # that of SwiGLU
    assert ends == [[value.name for value in values] for values in (graph.inputs, graph.outputs)]
    assert tensors == set(graph.initializers)
    assert traced.model.opset_imports[CPU_DOMAIN] == CPU_OPS_VERSION == OPS_VERSION
    cache = [value for value in (*graph.inputs, *graph.outputs) if str(value.name).startswith(("past", "present"))]
    assert len(cache) == 4 * layers and {value.dtype for value in cache} == {FLOAT16}


def test_swiglu_is_fused_into_the_projection_that_it_alone_reads() -> None:
    traced = lowered(weights=INT4)
    use_kernels(traced.model, FLOAT16)
    nodes = [node for node in traced.model.graph if node.op_type == "QwenLinear"]
    fused = [node for node in nodes if node.attributes["swiglu"].as_int()]
    assert [str(node.inputs[1].name).split(".")[-2] for node in fused] == ["gate_up_proj"] * len(fused)  # type: ignore[union-attr]
    assert len(fused) == HEADS_OF_16.num_hidden_layers
    for node in fused:
        (reader,) = {usage.node for usage in node.outputs[0].uses()}
        assert str(reader.inputs[1].name).endswith("down_proj.weight_codes")  # type: ignore[union-attr]


def edit(traced: Traced, op_type: str) -> ir.Node:
    return next(node for node in traced.model.graph if node.op_type == op_type)


def read_the_projection_twice(traced: Traced) -> None:
    y = edit(traced, "Split").inputs[0]
    again = ir.node("Neg", [y], name="again")
    traced.model.graph.insert_after(y.producer(), again)  # type: ignore[union-attr, arg-type]
    again.outputs[0].type, again.outputs[0].shape = y.type, y.shape  # type: ignore[union-attr]
    traced.model.graph.outputs.append(again.outputs[0])


def tell_the_gate(traced: Traced) -> None:
    traced.model.graph.outputs.append(edit(traced, "Split").outputs[0])


def use_another_gate(traced: Traced) -> None:
    edit(traced, "QuickGelu").attributes["alpha"] = ir.AttrFloat32("alpha", 1.702)


def swap_the_halves(traced: Traced) -> None:
    """Up · silu(gate) of the halves in the other order: not what the kernel computes."""
    split, silu = edit(traced, "Split"), edit(traced, "QuickGelu")
    product = next(usage.node for usage in silu.outputs[0].uses())
    gate, up = split.outputs
    silu.replace_input_with(0, up)
    product.replace_input_with(1, gate)


@pytest.mark.parametrize("change", [read_the_projection_twice, tell_the_gate, use_another_gate, swap_the_halves])
def test_another_form_of_swiglu_stays(change: Any) -> None:
    traced = lowered(weights=INT4)
    change(traced)
    use_kernels(traced.model, FLOAT16)
    found = counts(traced.model.graph)
    assert (found["Split"], found["QuickGelu"]) == (1, 1)  # of the first layer; the other's is fused
    assert found["MatMulNBits"] == 0


LINEAR_EDITS: dict[str, Any] = {
    "fp32 inputs": lambda node: node.attributes.__setitem__("accuracy_level", ir.AttrInt64("accuracy_level", 1)),
    "two bits": lambda node: node.attributes.__setitem__("bits", ir.AttrInt64("bits", 2)),
    "a block of 512": lambda node: node.attributes.__setitem__("block_size", ir.AttrInt64("block_size", 512)),
    "an attribute that isn't known": lambda node: node.attributes.__setitem__("future", ir.AttrInt64("future", 1)),
    "an order of columns": lambda node: (node.resize_inputs(5), node.replace_input_with(4, node.inputs[2])),
    "codes that are computed": lambda node: node.replace_input_with(1, node.inputs[0]),
}


@pytest.mark.parametrize("what", LINEAR_EDITS)
def test_another_form_of_a_projection_stays(what: str) -> None:
    traced = lowered(weights=INT4)
    projections = counts(traced.model.graph)["MatMulNBits"]
    LINEAR_EDITS[what](edit(traced, "MatMulNBits"))
    assert use_kernels(traced.model, FLOAT16).linears == projections - 1
    assert counts(traced.model.graph)["MatMulNBits"] == 1


ATTENTION_EDITS: dict[str, Any] = {
    "a window": lambda node: node.attributes.__setitem__("local_window_size", ir.AttrInt64("local_window_size", 64)),
    "no rotation": lambda node: node.attributes.__setitem__("do_rotary", ir.AttrInt64("do_rotary", 0)),
    "a mask": lambda node: node.replace_input_with(10, node.inputs[0]),
    "no lengths": lambda node: node.replace_input_with(16, None),
}


@pytest.mark.parametrize("what", ATTENTION_EDITS)
def test_one_attention_of_another_form_keeps_all_of_them(what: str) -> None:
    """The cache has one type: that of the kernels that are left."""
    traced = lowered(weights=INT4)
    ATTENTION_EDITS[what](edit(traced, "GroupQueryAttention"))
    assert use_kernels(traced.model, FLOAT16).attentions == 0
    found = counts(traced.model.graph)
    assert (found["GroupQueryAttention"], found["QwenGQA"]) == (HEADS_OF_16.num_hidden_layers, 0)
    assert {v.dtype for v in traced.model.graph.inputs if str(v.name).startswith("past")} == {FLOAT}


def caches(traced: Traced) -> set[ir.DataType | None]:
    """The types of the caches' inputs and outputs."""
    values = (*traced.model.graph.inputs, *traced.model.graph.outputs)
    return {value.dtype for value in values if str(value.name).startswith(("past", "present"))}


def test_an_int8_cache_keeps_its_codes_and_scales() -> None:
    traced, layers = lowered(weights=INT4, int8_cache=True), HEADS_OF_16.num_hidden_layers
    tensors = set(traced.model.graph.initializers)
    assert use_kernels(traced.model, CODES) == Replaced(4 * layers + 1, layers)
    assert caches(traced) == {CODES}
    assert tensors == set(traced.model.graph.initializers)
    nodes = [node for node in traced.model.graph if node.op_type == "QwenGQAInt8"]
    assert [tuple(value.name for value in node.inputs[10:]) for node in nodes] == [  # type: ignore[union-attr]
        scale_names(layer) for layer in range(layers)
    ]
    assert not counts(traced.model.graph)["GroupQueryAttention"]


INT8_ATTENTION_EDITS: dict[str, Any] = {
    "a scale for the whole tensor": lambda node: node.attributes.__setitem__(
        "v_quant_type", ir.AttrString("v_quant_type", "PER_TENSOR")
    ),
    "codes of four bits": lambda node: node.attributes.__setitem__(
        "kv_cache_bit_width", ir.AttrInt64("kv_cache_bit_width", 4)
    ),
    "a scale that is computed": lambda node: node.replace_input_with(12, node.inputs[0]),
    "no scale": lambda node: node.replace_input_with(13, None),
    "numbers as they are": lambda node: [
        setattr(value, "type", ir.TensorType(FLOAT)) for value in (node.inputs[3], node.inputs[4])
    ],
}


@pytest.mark.parametrize("what", INT8_ATTENTION_EDITS)
def test_one_attention_over_other_codes_keeps_all_of_them(what: str) -> None:
    traced = lowered(weights=INT4, int8_cache=True)
    INT8_ATTENTION_EDITS[what](edit(traced, "GroupQueryAttention"))
    assert use_kernels(traced.model, CODES).attentions == 0
    assert counts(traced.model.graph)["GroupQueryAttention"] == HEADS_OF_16.num_hidden_layers


@pytest.mark.parametrize(("has_codes", "asked"), [(True, FLOAT16), (False, CODES)])
def test_codes_become_no_numbers_and_numbers_no_codes(has_codes: bool, asked: ir.DataType) -> None:
    traced = lowered(weights=INT4, int8_cache=has_codes)
    assert use_kernels(traced.model, asked).attentions == 0
    assert caches(traced) == {CODES if has_codes else FLOAT}


WITH_NORMS = {"model_type": "qwen3", "attention_bias": False}
DEFINED = {"plain": DENSE, "with norms of heads": dataclasses.replace(DENSE, **WITH_NORMS)}  # heads of 8


@pytest.mark.parametrize("what", DEFINED)
def test_heads_that_no_kernel_of_onnxruntime_takes_have_ours(what: str) -> None:
    config = DEFINED[what]
    assert config.head_dim == 8
    traced = lowered(config, weights=INT4)
    graph = traced.model.graph
    ends = [[value.name for value in values] for values in (graph.inputs, graph.outputs)]
    tensors = set(graph.initializers)
    assert use_kernels(traced.model, FLOAT16).attentions == config.num_hidden_layers
    found = counts(graph)
    assert found["QwenGQA"] == config.num_hidden_layers
    assert not found.keys() & {"Attention", "TensorScatter", "RotaryEmbedding", "Not"}
    assert ends == [[value.name for value in values] for values in (graph.inputs, graph.outputs)]
    assert tensors == set(graph.initializers)
    assert caches(traced) == {FLOAT16}


def attribute(value: ir.Attr) -> Callable[[ir.Node], None]:
    return lambda node: node.attributes.__setitem__(value.name, value)


def read_again(op_type: str) -> Callable[[Traced], None]:
    """Its first result has another reader, the graph's caller."""
    return lambda traced: traced.model.graph.outputs.append(edit(traced, op_type).outputs[0])


def changed(op_type: str, change: Callable[[ir.Node], Any]) -> Callable[[Traced], None]:
    return lambda traced: change(edit(traced, op_type))


def make_constant(traced: Traced, values: list[int]) -> ir.Value:
    node = ir.node("Constant", [], {"value_ints": values})
    traced.model.graph.insert_before(traced.model.graph[0], node)
    return node.outputs[0]


def pick_other_heads(traced: Traced) -> None:
    edit(traced, "Gather").replace_input_with(1, make_constant(traced, [5, 4, 3, 2, 1, 0]))


DEFINITION_EDITS: dict[str, Callable[[Traced], None]] = {
    "a cap of scores": changed("Attention", attribute(ir.AttrFloat32("softcap", 30.0))),
    "another mask": changed("Not", lambda node: ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])),
    "a mask of another position": changed("Greater", lambda node: node.replace_input_with(1, node.inputs[0])),
    "values of another slot": changed("TensorScatter", lambda node: node.replace_input_with(2, node.inputs[0])),
    "rotation by pairs": changed("RotaryEmbedding", attribute(ir.AttrInt64("interleaved", 1))),
    "rotation by another table": changed("RotaryEmbedding", lambda node: node.replace_input_with(1, node.inputs[2])),
    "heads in another order": pick_other_heads,
    "heads of another axis": changed("Gather", attribute(ir.AttrInt64("axis", 2))),
    "a context that is told": read_again("Attention"),
}


@pytest.mark.parametrize("what", DEFINITION_EDITS)
def test_one_definition_of_another_form_keeps_all_of_them(what: str) -> None:
    traced = lowered(DENSE, weights=INT4)
    DEFINITION_EDITS[what](traced)
    assert use_kernels(traced.model, FLOAT16).attentions == 0
    assert counts(traced.model.graph)["Attention"] == DENSE.num_hidden_layers
    assert caches(traced) == {FLOAT}


@pytest.mark.parametrize(
    "layout", [BlockFormat(4, 16), BlockFormat(8, 16, symmetric=False)], ids=["int4", "int8_zero_points"]
)
def test_experts_read_the_same_tensors(layout: BlockFormat) -> None:
    assert MOE.moe is not None
    traced = lowered(MOE, weights=layout)
    graph = traced.model.graph
    before, tensors = counts(graph), set(graph.initializers)
    stock = [[value and value.name for value in node.inputs] for node in graph if node.op_type == "QMoE"]
    replaced = use_kernels(traced.model, FLOAT16)
    assert (replaced.linears, replaced.experts) == (before["MatMulNBits"], before["QMoE"])
    assert tensors == set(graph.initializers) and "QMoE" not in counts(graph)
    own = [node for node in graph if node.op_type == "QwenMoE"]
    assert len(own) == len(MOE.moe.sparse_layers) > 0
    for node, inputs in zip(own, stock, strict=True):
        wanted = [inputs[place] for place in (0, 1, 14, 2, 3, 11, 5, 6, 12)]
        assert (wanted[5] is None) == (wanted[8] is None) == layout.symmetric
        wanted = wanted[:-1] if layout.symmetric else wanted  # absent inputs at the end are left out
        assert [value and value.name for value in node.inputs] == wanted
        assert {name: attribute.as_int() for name, attribute in node.attributes.items()} == {
            "num_experts_per_tok": MOE.moe.num_experts_per_tok,
            "norm_topk_prob": int(MOE.moe.norm_topk_prob),
            "bits": layout.bits,
            "block_size": layout.block_size,
        }


def integer(name: str, value: int) -> Any:
    return lambda node: node.attributes.__setitem__(name, ir.AttrInt64(name, value))


def number(name: str, value: float) -> Any:
    return lambda node: node.attributes.__setitem__(name, ir.AttrFloat32(name, value))


def given(place: int, source: int) -> Any:
    return lambda node: node.replace_input_with(place, None if source < 0 else node.inputs[source])


EXPERT_EDITS: dict[str, Any] = {
    "fp32 inputs": integer("accuracy_level", 1),
    "two bits": integer("expert_weight_bits", 2),
    "a scale for each row": integer("block_size", 0),
    "a block of 512": integer("block_size", 512),
    "gates before ups": integer("swiglu_fusion", 2),
    "weights packed before": integer("weights_prepacked", 1),
    "an attribute that isn't known": integer("future", 1),
    "a limit of gates": number("swiglu_limit", 7.0),
    "another gate": number("activation_alpha", 1.702),
    "ups and one": number("activation_beta", 1.0),
    "another activation": lambda node: node.attributes.__setitem__(
        "activation_type", ir.AttrString("activation_type", "silu")
    ),
    "biases": given(4, 3),
    "a third projection": given(8, 2),
    "no weights of the router": given(14, -1),
    "codes that are computed": given(2, 0),
    "scales that are codes": given(6, 5),
    "zero points that are scales": given(11, 3),
}


@pytest.mark.parametrize("what", EXPERT_EDITS)
def test_another_form_of_experts_stays(what: str) -> None:
    traced = lowered(MOE, weights=INT4)
    layers = counts(traced.model.graph)["QMoE"]
    EXPERT_EDITS[what](edit(traced, "QMoE"))
    assert use_kernels(traced.model, FLOAT16).experts == layers - 1
    found = counts(traced.model.graph)
    assert (found["QMoE"], found["QwenMoE"], found["MatMulNBits"]) == (1, layers - 1, 0)


def test_experts_that_are_not_quantized_keep_their_definition() -> None:
    replaced = use_kernels(lowered(MOE).model, FLOAT)
    assert replaced.experts == 0


@pytest.mark.parametrize("config", [DENSE, HEADS_OF_16], ids=["defined", "fused"])
def test_branches_stay_as_they_are(config: Any) -> None:
    traced = lowered(config, weights=INT4, fast_prefill=True)
    before = ir.to_proto(traced.model).SerializeToString()
    assert not use_kernels(traced.model, FLOAT16)
    assert ir.to_proto(traced.model).SerializeToString() == before


def test_projections_of_exact_inputs_stay() -> None:
    traced = lowered(weights=INT4, accuracy_level=1)
    assert use_kernels(traced.model, FLOAT16) == Replaced(0, HEADS_OF_16.num_hidden_layers)


def test_a_graph_for_cuda_has_none() -> None:
    traced = ort.lower(trace(HEADS_OF_16, FLOAT16), OrtOptions(INT4, accuracy_level=1, provider=Provider.CUDA))
    assert not use_kernels(traced.model, FLOAT16)


def test_norms_of_heads_stay_in_front() -> None:
    config = dataclasses.replace(HEADS_OF_16, model_type="qwen3", attention_bias=False)
    traced = lowered(config, weights=INT4)
    assert use_kernels(traced.model, FLOAT16).attentions == config.num_hidden_layers
    for node in (node for node in traced.model.graph if node.op_type == "QwenGQA"):
        assert [value.producer().op_type for value in node.inputs[:3]] == ["Reshape", "Reshape", "Split"]  # type: ignore[union-attr]


# --- whole models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By case: checkpoint folder and transformers model."""
    root = tmp_path_factory.mktemp("kernels")
    cases = {
        **CASES,
        "heads_of_24": {"heads": 4, "kv_heads": 2, "head_dim": 24},
        "qwen3_heads_of_24": {"generation": "qwen3", "heads": 4, "kv_heads": 2, "head_dim": 24},
    }

    @functools.cache
    def make(case: str) -> tuple[Path, Any]:
        return root / case, save_tiny(root / case, **(cases | ALL_CHOSEN)[case])

    return make


def export(checkpoint: Path, folder: Path, options: OrtOptions, cache: ir.DataType = FLOAT16) -> Path:
    """Both graphs over one data file; the path of that for own kernels."""
    folder.mkdir()
    with open_checkpoint(checkpoint) as source:
        traced = ort.lower(trace(source.config), options)
        stitch(traced, source, folder / DATA_FILE)
        stock = save_graph(traced, folder)
    model = ir.load(stock)
    replaced = use_kernels(model, cache)
    assert replaced.linears and replaced.attentions == source.config.num_hidden_layers
    return save_beside(model, folder, "model.kernels.onnx")


def with_stored_weights(model: Any, layout: BlockFormat) -> Any:
    """The transformers model, its matrices replaced by what their codes stand for; those that decide stay."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim < 2 or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
                continue
            rows = parameter.numpy().reshape(-1, parameter.shape[-1])
            values = dequantize(quantize(rows, layout, np.float32), layout, rows.shape[1])
            parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))
    return rounded


# Root mean square, of logits with std 1: inputs are rounded to 8 bits block by block. Seen: 0.015 to 0.027. One output
# projection that reads another layer's weights is at 1.4 (the control). How inputs are rounded, the kernels' tests say.
BOUND = 0.05
FORMATS = {
    "int8": INT8,
    "int8_zero_points": BlockFormat(8, 32, symmetric=False),
    "int4": INT4,
    "int4_zero_points": BlockFormat(4, 16, symmetric=False),
    "int4_wide": BlockFormat(4, 128),  # wider than every matrix here
}


def stepped(onnx_file: Path, ids: list[int], prompt: int) -> np.ndarray:
    stepper = Stepper(onnx_file, rows=1, capacity=len(ids) + 8, fill=float("nan"))
    steps = [stepper.step([ids[:prompt]], pad=1)[0]] + [stepper.step([[token]])[0] for token in ids[prompt:]]
    return np.stack(steps)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", ["gqa", "tied", "odd_vocab", "qwen3", "heads_of_24", "qwen3_heads_of_24"])
def test_quantized_logits_are_those_of_the_stored_weights(case: str, name: str, models: Any, tmp_path: Path) -> None:
    checkpoint, model = models(case)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 15).tolist()
    layout = FORMATS[name]
    want = reference_logits(with_stored_weights(model, layout), [ids])[0, 5:].numpy()
    got = stepped(export(checkpoint, tmp_path / "onnx", OrtOptions(layout)), ids, 6)
    error = np.sqrt(np.square(got - want).mean())
    assert error < BOUND, error


# Every expert is chosen: what rounded inputs move changes no router's choice.
ALL_CHOSEN: dict[str, dict[str, Any]] = {
    "moe_all": {"moe": {"num_experts": 3, "num_experts_per_tok": 3}},
    "qwen3_moe_all": {
        "generation": "qwen3",
        "kv_heads": 2,
        "head_dim": 32,
        "moe": {"num_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": True},
    },
}
# Where it does, an expert stands for another that its router found as good, and all later tokens see it. Seen: 0.018 to
# 0.15; experts that read another layer's weights are at 0.8 and more (the control).
BOUND_OF_CHOICES = 0.25


def experts_error(checkpoint: Path, model: Any, layout: BlockFormat, folder: Path, *, mixed_up: bool = False) -> float:
    """Root mean square of logits' differences from the stored weights' model."""
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 15).tolist()
    want = reference_logits(with_stored_weights(model, layout), [ids])[0, 5:].numpy()
    onnx_file = export(checkpoint, folder, OrtOptions(layout))
    graph = onnx.load(onnx_file, load_external_data=False)
    nodes = [node for node in graph.graph.node if node.op_type == "QwenMoE"]
    assert nodes
    if mixed_up:
        nodes[0].input[3:] = nodes[1].input[3:]
        onnx_file.write_bytes(graph.SerializeToString())
    return float(np.sqrt(np.square(stepped(onnx_file, ids, 6) - want).mean()))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", ALL_CHOSEN)
def test_experts_are_those_of_the_stored_weights(case: str, name: str, models: Any, tmp_path: Path) -> None:
    error = experts_error(*models(case), FORMATS[name], tmp_path / "onnx")
    assert error < BOUND, error


@pytest.mark.parametrize("name", ["int8", "int4_zero_points"])
@pytest.mark.parametrize("case", ["moe", "moe_norm", "moe_k1", "moe_mixed", "qwen3_moe"])
def test_experts_are_chosen_as_by_the_stored_weights(case: str, name: str, models: Any, tmp_path: Path) -> None:
    error = experts_error(*models(case), FORMATS[name], tmp_path / "onnx")
    assert error < BOUND_OF_CHOICES, error


@pytest.mark.parametrize("case", ["moe", "qwen3_moe_all"])
def test_experts_that_read_another_layers_weights_are_found(case: str, models: Any, tmp_path: Path) -> None:
    """The control of the bounds above."""
    error = experts_error(*models(case), INT8, tmp_path / "onnx", mixed_up=True)
    assert error > 2 * BOUND_OF_CHOICES, error


@pytest.mark.parametrize("layout", [INT4, INT8], ids=["int4", "int8"])
@pytest.mark.parametrize("case", ["gqa", "moe"])
def test_a_row_does_not_depend_on_other_rows(case: str, layout: BlockFormat, models: Any, tmp_path: Path) -> None:
    checkpoint, model = models(case)
    onnx_file = export(checkpoint, tmp_path / "onnx", OrtOptions(layout))
    results = []
    for seed in (7, 8):
        ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, 5).tolist()
        stepper = Stepper(onnx_file, rows=2, capacity=24)
        stepper.step([[1, 2, 3, 4, 5], ids])
        results.append(stepper.step([[6], ids[:1]])[0])
    np.testing.assert_array_equal(results[0], results[1])


def test_a_projection_that_reads_another_layers_weights_is_found(models: Any, tmp_path: Path) -> None:
    """The control of the bound above."""
    checkpoint, model = models("gqa")
    onnx_file = export(checkpoint, tmp_path / "onnx", OrtOptions(INT8))
    graph = onnx.load(onnx_file, load_external_data=False)
    nodes = [node for node in graph.graph.node if node.op_type == "QwenLinear" and "o_proj" in node.input[1]]
    nodes[0].input[1] = nodes[1].input[1]
    onnx_file.write_bytes(graph.SerializeToString())
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 15).tolist()
    want = reference_logits(with_stored_weights(model, INT8), [ids])[0, 5:].numpy()
    error = np.sqrt(np.square(stepped(onnx_file, ids, 6) - want).mean())
    assert error > 3 * BOUND, error


def test_the_same_graph_is_the_same_bytes(models: Any, tmp_path: Path) -> None:
    checkpoint, _ = models("gqa")
    first, second = (export(checkpoint, tmp_path / name, OrtOptions(INT4)).read_bytes() for name in ("a", "b"))
    assert first == second
    named = onnx.load(tmp_path / "a" / "model.kernels.onnx", load_external_data=False).graph.initializer
    assert {entry.value for tensor in named for entry in tensor.external_data if entry.key == "location"} == {DATA_FILE}
