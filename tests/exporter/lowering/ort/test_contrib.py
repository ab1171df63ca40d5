"""The ort lowering: what each pass does and doesn't touch, and quantized models against transformers."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qwen_aot.engines.verify.reference import step
from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.lowering.ort.prefill import FROM_TOKENS
from qwen_aot.exporter.lowering.ort.provider import Provider
from qwen_aot.exporter.quantize.blockwise import BlockFormat, dequantize, quantize
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from qwen_aot.runtime.backends.cpu.features import NO_VNNI, has_exact_integer_products
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.cases import CASES
from tests.exporter.graph.test_trace import DENSE, MOE
from tests.exporter.stepper import Stepper, open_session

EXACT_BOUND = 1e-3  # fp32 sums in another order; seen: under 2e-5
INT8_ACTIVATIONS_BOUND = 0.5  # logits have std 1; activations rounded to 8 bits block by block; seen: under 0.3
QMOE_ORDER_BOUND = 1e-5  # fp32 sums in another order; seen: 5e-7
FORMATS = {
    "int8": BlockFormat(8, 32),
    "int8_zero_points": BlockFormat(8, 32, symmetric=False),
    "int4": BlockFormat(4, 32),
    "int4_zero_points": BlockFormat(4, 16, symmetric=False),
    "int4_wide": BlockFormat(4, 128),  # wider than every matrix here
}


def op_counts(traced: Traced) -> Counter[str]:
    return Counter(node.op_type for node in traced.model.graph)


def graph_of(text: str) -> Traced:
    return Traced(ir.from_proto(onnx.parser.parse_model(text)), DENSE)


# --- passes


def test_every_layer_becomes_one_attention_and_two_skip_norms():
    traced = ort.lower(trace(DENSE), OrtOptions())
    counts = op_counts(traced)
    # head_dim 8 is below the kernel's 16, so attention keeps its definition there
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * DENSE.num_hidden_layers
    assert counts["RMSNormalization"] == 1
    assert counts["GroupQueryAttention"] == 0
    assert counts["Attention"] == DENSE.num_hidden_layers


def test_attention_needs_neither_positions_nor_a_mask(tmp_path):
    save_tiny(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        traced = ort.lower(trace(checkpoint.config), OrtOptions())
    names = [value.name for value in traced.model.graph.inputs if not str(value.name).startswith("past")]
    assert names == ["input_ids", "cache_length", "new_tokens"]
    assert op_counts(traced)["GroupQueryAttention"] == 2


def test_norms_of_heads_stand_before_the_kernel_that_lacks_them():
    """Queries and keys are normalised apart from the values, and none of the three is put together again."""
    traced = ort.lower(trace(QWEN3), OrtOptions())
    for node in (node for node in traced.model.graph if node.op_type == "GroupQueryAttention"):
        query, key, value = node.inputs[:3]
        assert value.producer().op_type == "Split"
        for part, gain in ((query, "q_norm"), (key, "k_norm")):
            norm = part.producer().inputs[0].producer()
            assert (part.producer().op_type, norm.op_type) == ("Reshape", "RMSNormalization")
            assert norm.inputs[1].name.endswith(f"self_attn.{gain}.weight")
            assert norm.attributes["epsilon"].as_float() == pytest.approx(QWEN3.rms_norm_eps)
        assert all(input is None for input in node.inputs[14:16])  # q_norm_weight, k_norm_weight
    counts = op_counts(traced)
    assert (counts["GroupQueryAttention"], counts["RMSNormalization"]) == (2, 1 + 2 * 2)
    assert counts["HeadNorms"] == 0 and not traced.model.functions


def test_norms_of_heads_for_cuda_are_fp32():
    graph = for_cuda(QWEN3).model.graph
    norms = [node for node in graph if node.op_type == "RMSNormalization" and "norm" in node.inputs[1].name]
    of_heads = [node for node in norms if ".self_attn." in node.inputs[1].name]
    assert len(of_heads) == 2 * QWEN3.num_hidden_layers
    for node in (node for node in graph if node.op_type == "GroupQueryAttention"):
        assert [value.producer().op_type for value in node.inputs[:3]] == ["Cast", "Cast", "Split"]
    assert {node.inputs[0].producer().inputs[0].producer().op_type for node in of_heads} == {"Cast"}


NORM = """<ir_version: 10, opset_import: ["": 24, "com.microsoft": 1]>
g (float[B,S,8] a, float[{b}] b, float[8] gain) => (float[B,S,8] y, float[B,S,8] sum) {{
    sum = Add (a, b)
    y = RMSNormalization <axis = {axis}, epsilon = 0.00001> (sum, gain)
}}"""


def test_skip_norm_fuses_an_addition_and_its_norm_and_keeps_both_values():
    traced = graph_of(NORM.format(b="B,S,8", axis=-1))
    assert ort.fuse_skip_norm(traced) == 1
    (node,) = traced.model.graph
    assert node.op_type == "SkipSimplifiedLayerNormalization"
    assert [value.name for value in traced.model.graph.outputs] == ["y", "sum"]
    assert ort.fuse_skip_norm(traced) == 0


@pytest.mark.parametrize(
    ("b", "axis", "why"),
    [("8", -1, "the kernel adds no broadcast operand"), ("B,S,8", 1, "the kernel normalises the last axis only")],
)
def test_skip_norm_leaves_what_its_kernel_does_not_do(b, axis, why):
    traced = graph_of(NORM.format(b=b, axis=axis))
    assert ort.fuse_skip_norm(traced) == 0, why
    assert op_counts(traced) == Counter(Add=1, RMSNormalization=1)


def test_router_and_shared_gate_stay_fp32_and_every_other_matrix_is_quantized():
    counts = op_counts(ort.lower(trace(MOE), OrtOptions(BlockFormat(4, 16))))
    sparse = len(MOE.moe.sparse_layers)
    assert counts["QMoE"] == sparse
    # 4 a layer (q|k|v, o, gate|up, down: the shared expert's in sparse layers) and the head
    assert counts["MatMulNBits"] == 4 * MOE.num_hidden_layers + 1
    names = {value.name for value in trace(MOE).model.graph.initializers.values()}
    lowered = ort.lower(trace(MOE), OrtOptions(BlockFormat(4, 16)))
    kept = {name for name in names if name in lowered.model.graph.initializers and name.endswith("gate.weight")}
    assert len(kept) == 2 * sparse


def test_experts_keep_their_definition_where_no_block_divides_the_hidden_size():
    config = dataclasses.replace(MOE, hidden_size=40)
    counts = op_counts(ort.lower(trace(config), OrtOptions(BlockFormat(4, 32))))
    assert counts["QMoE"] == 0
    assert counts["If"] == len(MOE.moe.sparse_layers)


def test_a_tied_embedding_is_stored_once():
    config = dataclasses.replace(DENSE, tie_word_embeddings=True)
    traced = ort.lower(trace(config), OrtOptions(BlockFormat(4, 32)))
    tables = [name for name in traced.model.graph.initializers if "embed_tokens" in name or "lm_head" in name]
    assert sorted(tables) == ["model.embed_tokens.weight_codes", "model.embed_tokens.weight_scales"]
    (codes,) = (v for n, v in traced.model.graph.initializers.items() if n == "model.embed_tokens.weight_codes")
    assert {usage.node.op_type for usage in codes.uses()} == {"GatherBlockQuantized", "MatMulNBits"}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sensitive_matrices_get_their_own_format(tied):
    config = dataclasses.replace(DENSE, tie_word_embeddings=tied)
    traced = ort.lower(trace(config), OrtOptions(BlockFormat(4, 32), sensitive=BlockFormat(8, 16)))
    nodes = [node for node in traced.model.graph if node.op_type == "MatMulNBits"]
    bits = {node.inputs[1].name.split(".")[-2]: node.attributes["bits"].as_int() for node in nodes}
    head = "embed_tokens" if tied else "lm_head"
    assert bits == {"qkv_proj": 4, "o_proj": 4, "gate_up_proj": 4, "down_proj": 8, head: 8}
    (gather,) = (node for node in traced.model.graph if node.op_type == "GatherBlockQuantized")
    assert (gather.attributes["bits"].as_int(), gather.attributes["block_size"].as_int()) == (8, 16)


@pytest.mark.parametrize(
    ("provider", "dtype", "message"),
    [
        (Provider.CPU, ir.DataType.FLOAT16, "for cpu takes an fp32 trace, this one is float16; trace in FLOAT"),
        (Provider.CUDA, ir.DataType.BFLOAT16, "for cuda takes an fp16 or fp32 trace, this one is bfloat16"),
    ],
)
def test_a_trace_that_the_provider_has_no_kernels_for_is_refused(provider, dtype, message):
    with pytest.raises(ExportError, match=message):
        ort.lower(trace(DENSE, dtype), OrtOptions(provider=provider))


def test_accuracy_levels_that_do_not_exist_are_refused():
    with pytest.raises(ExportError, match=r"accuracy_level 2 doesn't exist; accepted: 1 \(fp32\), 4 \(int8\)"):
        OrtOptions(accuracy_level=2)


def test_fast_prefill_is_a_choice_between_two_forms_of_the_same_layers():
    traced = ort.lower(trace(DENSE), OrtOptions(BlockFormat(4, 32), fast_prefill=True))
    (choice,) = (node for node in traced.model.graph if node.op_type == "If")
    many, few = (
        Counter(node.op_type for node in choice.attributes[name].as_graph()) for name in ("then_branch", "else_branch")
    )
    per_layer = 4  # q|k|v, o, gate|up, down
    assert few["MatMulNBits"] == per_layer * DENSE.num_hidden_layers + 1
    assert few["MatMulIntegerToFloat"] == 0
    # The last layer's o, gate|up and down see one token a row, and so does the head.
    assert many["MatMulIntegerToFloat"] == per_layer * DENSE.num_hidden_layers - 3
    assert many["MatMulNBits"] == 4
    # q|k|v's input, o's, gate|up's and down's are quantized once each
    assert many["QuantizeLinear"] == many["MatMulIntegerToFloat"]


# --- passes, for CUDA

FLOAT16 = ir.DataType.FLOAT16
HEADS_OF_16 = dataclasses.replace(DENSE, head_dim=16)
QWEN3 = dataclasses.replace(HEADS_OF_16, model_type="qwen3", attention_bias=False, num_hidden_layers=2)


def for_cuda(config: Any = HEADS_OF_16, dtype: ir.DataType = FLOAT16, **options: Any) -> Traced:
    return ort.lower(trace(config, dtype), OrtOptions(**options, accuracy_level=1, provider=Provider.CUDA))


def test_attention_for_cuda_has_no_query_lengths_and_its_tables_are_in_its_type():
    traced = for_cuda()
    nodes = [node for node in traced.model.graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == HEADS_OF_16.num_hidden_layers
    for node in nodes:
        assert len(node.inputs) == 9
        assert [node.inputs[index].dtype for index in (0, 3, 4, 7, 8)] == [FLOAT16] * 5
        assert all(node.inputs[index].is_initializer() for index in (7, 8))  # cast when weights are written
    for name in ("model.rotary.cos", "model.rotary.sin"):
        assert traced.recipes[name].outputs[0].dtype == FLOAT16


def test_the_residual_stream_and_norms_for_cuda_are_fp32():
    traced = for_cuda()
    skips = [node for node in traced.model.graph if node.op_type == "SkipSimplifiedLayerNormalization"]
    assert len(skips) == 2 * DENSE.num_hidden_layers
    for node in skips:
        assert {value.dtype for value in node.inputs} == {ir.DataType.FLOAT}


def test_fp32_attention_for_cuda_keeps_its_definition():
    counts = op_counts(for_cuda(dtype=ir.DataType.FLOAT))
    assert counts["GroupQueryAttention"] == 0
    assert counts["Attention"] == counts["TensorScatter"] / 2 == HEADS_OF_16.num_hidden_layers


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_embedding_for_cuda_has_zero_points_and_scales_in_fp16(symmetric):
    traced = for_cuda(weights=BlockFormat(8, 16, symmetric))
    (gather,) = (node for node in traced.model.graph if node.op_type == "GatherBlockQuantized")
    assert gather.inputs[3] is not None and gather.inputs[3].dtype == ir.DataType.UINT8
    multiplications = [node for node in traced.model.graph if node.op_type == "MatMulNBits"]
    assert {node.inputs[2].dtype for node in multiplications} == {FLOAT16}
    has_zero_points = {len(node.inputs) > 3 and node.inputs[3] is not None for node in multiplications}
    assert has_zero_points == {not symmetric}


def test_quantized_experts_for_cuda_are_refused_and_others_stay_standard():
    with pytest.raises(ExportError, match="quantized experts don't exist for cuda"):
        for_cuda(MOE, weights=BlockFormat(8, 16))
    counts = op_counts(for_cuda(MOE))
    assert counts["If"] == len(MOE.moe.sparse_layers)
    assert counts["QMoE"] == 0


def test_fast_prefill_for_cuda_is_refused():
    with pytest.raises(ExportError, match="fast_prefill exists for the CPU's kernels, not for those of cuda"):
        OrtOptions(BlockFormat(8, 32), fast_prefill=True, provider=Provider.CUDA)


def test_fast_prefill_of_fp32_weights_is_refused():
    with pytest.raises(ExportError, match="fast_prefill goes with quantized weights, and these are fp32"):
        OrtOptions(fast_prefill=True)


# --- whole models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By case: checkpoint folder and transformers model."""
    root = tmp_path_factory.mktemp("ort")

    @functools.cache
    def make(case: str) -> tuple[Path, Any]:
        return root / case, save_tiny(root / case, **CASES[case])

    return make


def export(checkpoint: Path, folder: Path, options: OrtOptions) -> Path:
    folder.mkdir()
    with open_checkpoint(checkpoint) as source:
        traced = ort.lower(trace(source.config), options)
        stitch(traced, source, folder / DATA_FILE)
        return save_graph(traced, folder)


def with_rounded_weights(
    model: Any, ordinary: BlockFormat, sensitive: BlockFormat | None = None, scale_dtype: Any = np.float32
) -> Any:
    """The transformers model, its weights replaced by what their codes and scales, as stored, stand for."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim < 2 or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
                continue
            is_sensitive = name.endswith(("embed_tokens.weight", "lm_head.weight", "down_proj.weight"))
            layout = sensitive if sensitive is not None and is_sensitive else ordinary
            rows = parameter.numpy().reshape(-1, parameter.shape[-1])
            values = dequantize(quantize(rows, layout, scale_dtype), layout, rows.shape[1])
            parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))
    return rounded


def stepped_logits(onnx_file: Path, ids: list[int], prompt: int) -> np.ndarray:
    stepper = Stepper(onnx_file, rows=1, capacity=len(ids) + 8)
    steps = [stepper.step([ids[:prompt]])[0]] + [stepper.step([[token]])[0] for token in ids[prompt:]]
    return np.stack(steps)


def compare(models: Any, case: str, options: OrtOptions, tmp_path: Path) -> float:
    """Largest logit difference from transformers with the same rounded weights."""
    checkpoint, model = models(case)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 15).tolist()
    want = reference_logits(with_rounded_weights(model, options.weights, options.sensitive), [ids])[0].numpy()
    got = stepped_logits(export(checkpoint, tmp_path / "onnx", options), ids, 6)
    return float(np.abs(got - want[5:]).max())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", ["gqa", "tied", "odd_vocab", "qwen3"])
def test_quantized_logits_are_those_of_the_rounded_weights(case, name, models, tmp_path):
    assert compare(models, case, OrtOptions(FORMATS[name], accuracy_level=1), tmp_path) < EXACT_BOUND


@pytest.mark.parametrize("case", ["tied", "gqa"])
def test_models_of_two_formats_are_those_of_the_rounded_weights(case, models, tmp_path):
    options = OrtOptions(FORMATS["int4_wide"], FORMATS["int8_zero_points"], accuracy_level=1)
    assert compare(models, case, options, tmp_path) < EXACT_BOUND


# Eight-bit experts have no fp32 kernel: their activations are int8 at every level, and a router's choice may flip.
@pytest.mark.parametrize("name", ["int4", "int4_zero_points"])
@pytest.mark.parametrize("case", ["moe", "moe_norm", "moe_k1", "moe_mixed", "qwen3_moe"])
def test_quantized_experts_are_those_of_the_rounded_weights(case, name, models, tmp_path):
    assert compare(models, case, OrtOptions(FORMATS[name], accuracy_level=1), tmp_path) < EXACT_BOUND


@pytest.mark.parametrize("name", FORMATS)
def test_int8_activations_move_logits_a_little(name, models, tmp_path):
    assert compare(models, "gqa", OrtOptions(FORMATS[name]), tmp_path) < INT8_ACTIVATIONS_BOUND


@pytest.mark.parametrize("rows", [1, 5, 64])  # each has a kernel of its own
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_eight_bit_kernels_round_activations_to_the_nearest_code_and_nothing_else(block_size, rows):
    """Whatever the CPU: its bundles differ from another's in the order of fp32 sums alone (docs/performance.md).

    Activations lie near codes of any size, so that rounding is beyond doubt, and pairs of products beyond 16 bits.
    """
    K, N, n = 4 * block_size, 48, 4
    random = np.random.default_rng(rows)
    codes = random.integers(0, 256, (N, n, block_size), np.uint8)
    scales = random.uniform(0.5, 1.5, (N, n)).astype(np.float32)
    near = random.integers(-126, 127, (rows, n, block_size)).astype(np.float32)
    x = near + random.uniform(-0.4, 0.4, near.shape).astype(np.float32)
    near[..., 0] = x[..., 0] = 127  # the largest: a step is 1
    attributes = {"K": K, "N": N, "bits": 8, "block_size": block_size, "accuracy_level": OrtOptions().accuracy_level}
    node = onnx.helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain=ort.MS_DOMAIN, **attributes)
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in (("codes", codes), ("scales", scales))]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "one", ends[:1], ends[1:], tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(ort.MS_DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (got,) = open_session(model.SerializeToString()).run(None, {"x": x.reshape(rows, K)})
    weight = ((codes - 128.0) * scales[..., None]).reshape(N, K)
    want = near.reshape(rows, K) @ weight.T
    unrounded = x.reshape(rows, K) @ weight.T
    size = np.abs(want).max()
    assert np.abs(got - want).max() < 1e-5 * size  # fp32 sums; seen: 5e-7
    assert np.abs(unrounded - want).max() > 1e-3 * size


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("case", ["gqa", "moe"])
def test_a_row_of_a_quantized_model_does_not_depend_on_other_rows(case, name, models, tmp_path):
    checkpoint, model = models(case)
    onnx_file = export(checkpoint, tmp_path / "onnx", OrtOptions(FORMATS[name]))
    results = []
    for seed in (7, 8):
        ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, 5).tolist()
        stepper = Stepper(onnx_file, rows=2, capacity=24)
        stepper.step([[1, 2, 3, 4, 5], ids])
        results.append(stepper.step([[6], ids[:1]])[0])
    if case == "moe":  # without AVX-512, QMoE sums an expert's tokens in an order that depends on how many there are
        np.testing.assert_allclose(results[0], results[1], atol=QMOE_ORDER_BOUND, rtol=0)
    else:
        np.testing.assert_array_equal(results[0], results[1])


def dynamic_rows(x: torch.Tensor) -> torch.Tensor:
    """Activations as the integer GEMM sees them: 8 bits, one scale a token."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
    return torch.round(x / scale) * scale


def with_integer_projections(model: Any) -> Any:
    """The transformers model as the many-token branch computes it: 8-bit channels and 8-bit tokens."""
    integer = copy.deepcopy(model)
    for name, module in integer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers"):
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            module.weight = torch.nn.Parameter(torch.round(module.weight.detach() / scale) * scale)
            module.register_forward_pre_hook(lambda _, inputs: (dynamic_rows(inputs[0]),))
    return integer


def within_seven_bits(model: Any) -> Any:
    """A copy whose projections' channels have codes of at most 64, and 127 once a row, in a pair with a zero.

    Two products of an activation's unsigned byte, at most 255, then add up to at most 32,640: no kernel saturates.
    """
    narrow = copy.deepcopy(model)
    for name, module in narrow.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers"):
            weight = module.weight.detach()
            largest = weight.abs().amax(dim=1, keepdim=True)
            weight.clamp_(-largest * 64 / 127, largest * 64 / 127)
            rows = torch.arange(len(weight))
            pairs = rows % (weight.shape[1] // 2)
            weight[rows, 2 * pairs] = largest[:, 0]
            weight[rows, 2 * pairs + 1] = 0
    return narrow


def with_defined_products(onnx_file: Path) -> Path:
    """Replaces MatMulIntegerToFloat by its definition, in place: fp32 holds sums of so few products exactly."""
    model = onnx.load(onnx_file, load_external_data=False)
    (choice,) = (node for node in model.graph.node if node.op_type == "If")
    (many,) = (attribute.g for attribute in choice.attribute if attribute.name == "then_branch")
    nodes = list(many.node)
    del many.node[:]
    replaced = 0
    for node in nodes:
        if node.op_type != "MatMulIntegerToFloat":
            many.node.append(node)
            continue
        replaced += 1
        a, b, a_scale, b_scale, zero = node.input
        steps = [
            ("Cast", [a], "a", {"to": onnx.TensorProto.FLOAT}),
            ("Cast", [zero], "zero", {"to": onnx.TensorProto.FLOAT}),
            ("Cast", [b], "b", {"to": onnx.TensorProto.FLOAT}),
            ("Sub", ["a", "zero"], "centred", {}),
            ("MatMul", ["centred", "b"], "product", {}),
            ("Mul", [a_scale, b_scale], "scale", {}),
            ("Mul", ["product", "scale"], "", {}),
        ]
        named = {result: f"{node.name}.{result}" for _, _, result, _ in steps} | {"": node.output[0]}
        for op_type, inputs, result, attributes in steps:
            operands = [named.get(name, name) for name in inputs]
            many.node.append(onnx.helper.make_node(op_type, operands, [named[result]], **attributes))
    assert replaced
    onnx.save(model, onnx_file)
    return onnx_file


@pytest.fixture(params=["7 bits", "8 bits", "8 bits, as defined"])
def fast_prefill(request, models, tmp_path, monkeypatch):
    """Exports a case: its (perhaps narrowed) transformers model, and a graph that this CPU computes exactly.

    Eight bits saturate in kernels without VNNI, and the runtime refuses such a bundle there. On such a CPU, and on one
    that counts as such, they are multiplied as defined; the kernel gets the seven bits that it computes exactly.
    """
    if request.param == "8 bits, as defined":
        monkeypatch.setenv(NO_VNNI, "1")

    def make(case: str, **options: Any) -> tuple[Any, Path]:
        checkpoint, model = models(case)
        if request.param == "7 bits":
            model, checkpoint = within_seven_bits(model), tmp_path / "narrow"
            model.save_pretrained(checkpoint)
        onnx_file = export(checkpoint, tmp_path / "onnx", OrtOptions(FORMATS["int8"], fast_prefill=True, **options))
        is_exact = request.param == "7 bits" or has_exact_integer_products()
        return model, onnx_file if is_exact else with_defined_products(onnx_file)

    return make


def test_fast_prefill_computes_integer_projections_and_decodes_from_the_cache_it_left(fast_prefill):
    # the last layer's other projections stay in blocks: only q|k|v is integer
    model, onnx_file = fast_prefill("one_layer", accuracy_level=1)
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, FROM_TOKENS + 10).tolist()
    got = stepped_logits(onnx_file, ids, FROM_TOKENS)
    reference = with_rounded_weights(model, FORMATS["int8"])
    attention = reference.model.layers[0].self_attn
    exact = copy.deepcopy(attention)
    integer = with_integer_projections(model).model.layers[0].self_attn
    for part in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, part, integer.get_submodule(part))
    prefilled, cache = step(reference, torch.tensor([ids[:FROM_TOKENS]]))
    assert np.abs(got[0] - prefilled[0, -1].detach().numpy()).max() < EXACT_BOUND
    # From here on one token a step: the block form, on the keys and values that the integer form cached.
    for part in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, part, exact.get_submodule(part))
    rest, _ = step(reference, torch.tensor([ids[FROM_TOKENS:]]), cache)
    assert np.abs(got[1:] - rest[0].detach().numpy()).max() < EXACT_BOUND


@pytest.mark.parametrize("case", ["gqa", "moe_k1"])
def test_fast_prefill_stays_close_and_rows_stay_apart(case, fast_prefill):
    model, onnx_file = fast_prefill(case)
    mine, *others = (
        np.random.default_rng(seed).integers(0, model.config.vocab_size, FROM_TOKENS + 3).tolist() for seed in (1, 2, 3)
    )
    results = []
    for other in others:
        stepper = Stepper(onnx_file, rows=2, capacity=64)
        results.append(stepper.step([mine, other[:-2]], pad=2)[0])
    np.testing.assert_array_equal(results[0], results[1])
    want = reference_logits(model, [mine])[0, -1].numpy()
    assert np.abs(results[0] - want).max() < INT8_ACTIVATIONS_BOUND


# --- whole models, for CUDA (the CPU provider computes fp16 through fp32 where it has no kernel of its own)

FP16_BOUND = 2e-2  # logits of std 1 from activations of 11 bits; seen: 7e-3
BITS = {"int8": BlockFormat(8, 32), "int4": BlockFormat(4, 32), "int8_zero_points": BlockFormat(8, 32, symmetric=False)}


def export_for_cuda(checkpoint: Path, folder: Path, dtype: ir.DataType, weights: BlockFormat | None = None) -> Path:
    sensitive = None if weights is None else dataclasses.replace(weights, bits=8)
    folder.mkdir()
    with open_checkpoint(checkpoint) as source:
        options = OrtOptions(weights, sensitive, accuracy_level=1, provider=Provider.CUDA)
        traced = ort.lower(trace(source.config, dtype), options)
        stitch(traced, source, folder / DATA_FILE)
        return save_graph(traced, folder)


@pytest.mark.parametrize(("dtype", "bound"), [(FLOAT16, FP16_BOUND), (ir.DataType.FLOAT, EXACT_BOUND)])
@pytest.mark.parametrize("case", CASES)
def test_models_for_cuda_equal_transformers(case, dtype, bound, models, tmp_path):
    """A padded prompt, then one token a step: padding counts as tokens, and what it wrote is overwritten.

    No router is near a tie on these tokens, where fp16 may choose another expert.
    """
    checkpoint, model = models(case)
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, 15).tolist()
    stepper = Stepper(export_for_cuda(checkpoint, tmp_path / "onnx", dtype), rows=1, capacity=32)
    got = [stepper.step([ids[:6]], pad=3)[0]] + [stepper.step([[token]])[0] for token in ids[6:]]
    want = reference_logits(model, [ids])[0, 5:].numpy()
    np.testing.assert_allclose(np.stack(got), want, atol=bound, rtol=0)


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("case", ["gqa", "tied", "odd_vocab"])
def test_quantized_models_for_cuda_are_those_of_the_rounded_weights(case, name, models, tmp_path):
    checkpoint, model = models(case)
    layout = BITS[name]
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 15).tolist()
    in_fp16 = copy.deepcopy(model).half().float()  # what is quantized is what the trace's type holds
    rounded = with_rounded_weights(in_fp16, layout, dataclasses.replace(layout, bits=8), np.float16)
    want = reference_logits(rounded, [ids])[0, 5:].numpy()
    got = stepped_logits(export_for_cuda(checkpoint, tmp_path / "onnx", FLOAT16, layout), ids, 6)
    assert np.abs(got - want).max() < FP16_BOUND


def test_decode_for_cuda_takes_rows_of_unequal_length_and_idle_ones(models, tmp_path):
    checkpoint, model = models("gqa")
    onnx_file = export_for_cuda(checkpoint, tmp_path / "onnx", FLOAT16)
    rows = [np.random.default_rng(seed).integers(0, model.config.vocab_size, 9).tolist() for seed in (1, 2)]
    stepper = Stepper(onnx_file, rows=2, capacity=24)
    held: list[list[int]] = [[], []]
    for tokens in ([rows[0][:1], rows[1][:1]], [rows[0][1:2], []], [rows[0][2:3], rows[1][1:2]], [[], rows[1][2:3]]):
        logits = stepper.step(tokens)
        for row, new in enumerate(tokens):
            held[row] += new
            if new:
                want = reference_logits(model, [held[row]])[0, -1].numpy()
                np.testing.assert_allclose(logits[row], want, atol=FP16_BOUND, rtol=0)


def test_a_residual_stream_beyond_float16_does_not_overflow_for_cuda(tmp_path):
    """Every projection's result fits float16, their sum doesn't."""
    model = save_tiny(tmp_path / "checkpoint", **CASES["gqa"], layers=4)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1e5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 3e4
            layer.mlp.down_proj.weight *= 3e4
    model.save_pretrained(tmp_path / "checkpoint")
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 9).tolist()
    with torch.no_grad():
        streams = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert max(float(stream.abs().max()) for stream in streams) > 65504
    stepper = Stepper(export_for_cuda(tmp_path / "checkpoint", tmp_path / "onnx", FLOAT16), rows=1, capacity=16)
    want = reference_logits(model, [ids])[0, -1].numpy()
    np.testing.assert_allclose(stepper.step([ids])[0], want, atol=FP16_BOUND, rtol=0)
