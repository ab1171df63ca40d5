"""The plugin lowering in every form of weights and cache: what it stores and refuses, its numbers, what is parsed."""

from __future__ import annotations

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
from transformers import DynamicCache

from qwen_aot.engines.verify.reference import step
from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.ops import DOMAIN
from qwen_aot.exporter.graph.plugin_ops import ATTRIBUTES, PluginOp
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import plugin
from qwen_aot.exporter.lowering.tensorrt.plugin import PluginOptions
from qwen_aot.exporter.lowering.widen import widen_bf16
from qwen_aot.exporter.model.io_spec import io_spec
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.cases import CASES
from tests.exporter.graph.test_trace import DENSE, MOE
from tests.exporter.rounded import rounded_experts, rounded_model
from tests.exporter.stepper import Stepper

FLOAT, FLOAT16, BFLOAT16, INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8

# Of logits with std 1, against the same rounded weights in fp32. fp16: activations of 11 bits; seen: 7e-3. fp32: sums
# in another order; with an int8 cache they may move a key or value over the edge of a rounding, by one step of 127, of
# which nothing was seen (2e-6).
FP32_BOUND, FP16_BOUND, INT8_CACHE_BOUND = 1e-3, 2e-2, 5e-3

WIDE = {"moe_int": {"hidden": 128, "layers": 2, "moe": {"moe_intermediate_size": 128, "num_experts": 5}}}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Case -> (checkpoint folder, transformers model), each made once."""
    root = tmp_path_factory.mktemp("plugin")

    @functools.cache
    def make(case: str) -> tuple[Path, Any]:
        return root / case, save_tiny(root / case, **(CASES | WIDE)[case])

    return make


def export(checkpoint: Path, folder: Path, dtype: ir.DataType, **options: Any) -> Path:
    """bf16 is widened to fp32, since it can't be run here."""
    folder.mkdir(exist_ok=True, parents=True)
    with open_checkpoint(checkpoint) as source:
        traced = plugin.lower(trace(source.config, dtype), PluginOptions(**options))
        if dtype == BFLOAT16:
            assert widen_bf16(traced) > 0
        stitch(traced, source, folder / DATA_FILE)
        return save_graph(traced, folder)


def tokens_of(model: Any, count: int = 17, seed: int = 2) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, count).tolist()


def stepped(onnx_file: Path, ids: list[int]) -> np.ndarray:
    """Logits of prefills of 5 and 4 tokens, then one token a step; NaN in every slot that isn't written yet."""
    stepper = Stepper(onnx_file, rows=1, capacity=24, fill=float("nan"))
    stepper.step([ids[:5]], pad=2)
    return np.stack([stepper.step([ids[5:9]], pad=1)[0]] + [stepper.step([[token]])[0] for token in ids[9:]])


# --- numbers


@pytest.mark.parametrize("case", ["gqa", "head_dim", "moe_norm", "moe_mixed", "qwen3"])
def test_float16(case, models, tmp_path):
    checkpoint, model = models(case)
    ids = tokens_of(model)
    got = stepped(export(checkpoint, tmp_path, FLOAT16), ids)
    want = reference_logits(rounded_model(model, "fp16"), [ids])[0, 8:].numpy()
    np.testing.assert_allclose(got, want, atol=FP16_BOUND, rtol=0)


@pytest.mark.parametrize("case", ["gqa", "moe", "qwen3_moe"])
def test_bfloat16_widened_to_fp32(case, models, tmp_path):
    """The definitions take fp32 tensors, so that weights keep their bfloat16 values and nothing else is rounded."""
    checkpoint, model = models(case)
    ids = tokens_of(model)
    got = stepped(export(checkpoint, tmp_path, BFLOAT16), ids)
    want = reference_logits(rounded_model(model, "bf16", rounds_rotary=False), [ids])[0, 8:].numpy()
    np.testing.assert_allclose(got, want, atol=FP32_BOUND, rtol=0)


class Int8Cache(DynamicCache):
    """Keeps each key and value as transformers would read it from codes of its largest magnitude / 127, in fp16."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(through_int8(key_states), through_int8(value_states), *args, **kwargs)


def through_int8(x: torch.Tensor) -> torch.Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    return (x / scale).round().clamp(-127, 127) * scale


def int8_cache_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits, _ = step(model, torch.tensor([ids]), Int8Cache())
    return logits[0].numpy()


@pytest.mark.parametrize("case", ["mha", "gqa", "mqa", "head_dim", "moe", "qwen3"])
def test_an_int8_cache_equals_transformers_with_one(case, models, tmp_path):
    checkpoint, model = models(case)
    ids = tokens_of(model)
    got = stepped(export(checkpoint, tmp_path, FLOAT, int8_cache=True), ids)
    want = int8_cache_logits(model, ids)[8:]
    np.testing.assert_allclose(got, want, atol=INT8_CACHE_BOUND, rtol=0)
    assert np.abs(got - reference_logits(model, [ids])[0, 8:].numpy()).max() > 2 * np.abs(got - want).max()


def test_rows_of_an_int8_cache_are_independent_and_idle_ones_stay(models, tmp_path):
    checkpoint, model = models("gqa")
    stepper = Stepper(export(checkpoint, tmp_path, FLOAT, int8_cache=True), rows=3, capacity=24, fill=float("nan"))
    rows = [tokens_of(model, 12, seed) for seed in (3, 4, 5)]
    stepper.step([rows[0][:5], rows[1][:1], rows[2][:3]], pad=2)
    before = {name: cache[0].copy() for name, cache in stepper.cache.items()}
    logits = stepper.step([[], rows[1][1:8], rows[2][3:4]])
    for name, cache in stepper.cache.items():
        np.testing.assert_array_equal(cache[0], before[name])
    for row, count in ((1, 8), (2, 4)):
        want = int8_cache_logits(model, rows[row][:count])[-1]
        np.testing.assert_allclose(logits[row], want, atol=INT8_CACHE_BOUND, rtol=0)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_experts_equal_transformers_with_the_same_rounded_weights(weights, models, tmp_path):
    checkpoint, model = models("moe_int")
    ids = tokens_of(model)
    got = stepped(export(checkpoint, tmp_path, FLOAT16, weights=weights), ids)
    same = rounded_experts(rounded_model(model, weights), weights)
    want, own = (reference_logits(m, [ids])[0, 8:].numpy() for m in (same, model))
    np.testing.assert_allclose(got, want, atol=FP16_BOUND, rtol=0)
    dense = reference_logits(rounded_model(model, weights), [ids])[0, 8:].numpy()
    for other in (own, dense):
        assert np.abs(got - other).max() > 2 * np.abs(got - want).max()  # experts were rounded


@pytest.mark.parametrize(("attention", "moe"), [("native", "plugin"), ("plugin", "native")])
def test_one_plugin_alone(attention, moe, models, tmp_path):
    checkpoint, model = models("moe")
    ids = tokens_of(model)
    onnx_file = export(checkpoint, tmp_path, FLOAT, attention=attention, moe=moe)
    stepper = Stepper(onnx_file, rows=1, capacity=24)
    got = np.stack([stepper.step([ids[:9]])[0]] + [stepper.step([[token]])[0] for token in ids[9:]])
    np.testing.assert_allclose(got, reference_logits(model, [ids])[0, 8:].numpy(), atol=FP32_BOUND, rtol=0)


# --- the graph


def op_counts(traced: Traced) -> Counter[str]:
    return Counter(node.op_type for node in traced.model.graph)


def lowered(config: Any, **options: Any) -> Traced:
    return plugin.lower(trace(config, FLOAT16, capacity=64), PluginOptions(**options))


WIDE_MOE = dataclasses.replace(
    MOE, hidden_size=128, moe=dataclasses.replace(MOE.moe, moe_intermediate_size=256, num_experts=4)
)


def stored(traced: Traced) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        output.name.removeprefix("model.layers.0.mlp."): (output.dtype.name, output.shape)
        for recipe in traced.recipes.values()
        for output in recipe.outputs
        if output.name.startswith("model.layers.0.mlp.experts")
    }


def test_a_layer_has_one_node_of_each_plugin_with_their_fields():
    traced = lowered(MOE)
    nodes = [node for node in traced.model.graph if node.domain == DOMAIN]
    layers, sparse = MOE.num_hidden_layers, len(MOE.moe.sparse_layers)
    assert Counter(node.op_type for node in nodes) == {PluginOp.GQA: layers, PluginOp.MOE: sparse}
    for node in nodes:
        assert tuple(node.attributes) == ATTRIBUTES[PluginOp(node.op_type)]
    assert {function.name for function in traced.model.functions.values()} == {PluginOp.GQA, PluginOp.MOE}
    assert not {"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization", "If", "Loop"} & set(
        op_counts(traced)
    )


def test_inputs_that_serve_the_window_alone_are_absent():
    names = [value.name for value in lowered(DENSE).model.graph.inputs]
    assert names == [spec.name for spec in io_spec(DENSE, FLOAT16, 64).inputs if spec.name != "key_positions"]


@pytest.mark.parametrize("options", [{}, {"int8_cache": True}], ids=["same", "int8"])
def test_inputs_and_outputs_are_the_contracts(options):
    graph = lowered(DENSE, **options).model.graph
    spec = io_spec(DENSE, INT8 if options else FLOAT16, 64)
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        found = [
            (value.name, value.dtype, tuple(value.shape.numpy() if value.shape.is_static() else value.shape))
            for value in values
        ]
        want = [(t.name, t.dtype, t.dims) for t in tensors if t.name != "key_positions"]
        assert [(name, dtype, tuple(map(str, dims))) for name, dtype, dims in found] == [
            (name, dtype, tuple(map(str, dims))) for name, dtype, dims in want
        ]


@pytest.mark.parametrize(("weights", "opset"), [(None, 20), ("int8", 20), ("fp8", 20), ("int4", 21)])
def test_no_op_is_newer_than_the_opset(weights, opset):
    config = dataclasses.replace(DENSE, hidden_size=128, intermediate_size=128)
    traced = lowered(config, weights=weights)
    assert traced.model.graph.opset_imports[""] == opset
    for node in traced.model.graph:
        if not node.domain:
            assert onnx.defs.get_schema(node.op_type, opset).since_version <= opset
    assert {function.opset_imports[""] for function in traced.model.functions.values()} == {opset}


def test_experts_are_stored_as_the_plugin_reads_them():
    assert stored(lowered(WIDE_MOE)) == {
        "experts_gate_up": ("FLOAT16", (4, 512, 128)),
        "experts_down": ("FLOAT16", (4, 128, 256)),
    }
    assert stored(lowered(WIDE_MOE, weights="int8")) == {
        "experts_gate_up_codes": ("INT8", (4, 512, 128)),
        "experts_gate_up_scales": ("FLOAT16", (4, 512)),
        "experts_down_codes": ("INT8", (4, 128, 256)),
        "experts_down_scales": ("FLOAT16", (4, 128)),
    }
    assert stored(lowered(WIDE_MOE, weights="int4")) == {
        "experts_gate_up_codes": ("INT8", (4, 512, 64)),
        "experts_gate_up_scales": ("FLOAT16", (4, 512, 1)),
        "experts_down_codes": ("INT8", (4, 128, 128)),
        "experts_down_scales": ("FLOAT16", (4, 128, 2)),
    }


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_routers_keep_the_compute_type(weights):
    names = {output.name for recipe in lowered(WIDE_MOE, weights=weights).recipes.values() for output in recipe.outputs}
    assert "model.layers.0.mlp.gate.weight" in names
    assert "model.layers.0.mlp.shared_expert.down_proj.weight_codes" in names


def test_quantized_experts_do_not_depend_on_how_a_checkpoint_is_cut_into_chunks():
    traced = lowered(WIDE_MOE, weights="int4")
    recipe = traced.recipes["model.layers.0.mlp.experts_gate_up_codes"]
    rows = np.random.default_rng(0).standard_normal((12, 128)).astype(np.float32)
    whole, parts = recipe.transform(rows), [recipe.transform(rows[:5]), recipe.transform(rows[5:])]
    for index, array in enumerate(whole):
        np.testing.assert_array_equal(array, np.concatenate([part[index] for part in parts]))


def test_what_is_parsed_has_no_definitions_and_names_its_plugins(tmp_path):
    traced = lowered(MOE)
    count = MOE.num_hidden_layers + len(MOE.moe.sparse_layers)
    assert plugin.strip_definitions(traced) == count
    assert plugin.strip_definitions(traced) == count  # twice changes nothing
    model = onnx.load(save_graph(traced, tmp_path), load_external_data=False)
    assert not model.functions
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert len(nodes) == count
    for node in nodes:
        fields = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert (fields["plugin_namespace"], fields["plugin_version"]) == (b"qwen_aot", b"1")
        assert set(ATTRIBUTES[PluginOp(node.op_type)]) < set(fields)


def test_native_forms_need_no_plugin():
    traced = lowered(MOE, attention="native", moe="native")
    assert plugin.strip_definitions(traced) == 0
    assert not traced.model.functions


# --- refusals


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_native_experts_are_refused_and_the_plugin_is_named(weights):
    with pytest.raises(ExportError, match=rf"{weights} weights of a mixture of experts .*--moe plugin"):
        lowered(MOE, moe="native", weights=weights)


def test_experts_without_a_form_in_the_plugin():
    with pytest.raises(ExportError, match=r"fp8 experts don't exist in the QwenMoE plugin; accepted: .*int8, int4"):
        lowered(WIDE_MOE, weights="fp8")
    with pytest.raises(ExportError, match="blocks of 128 elements, and the experts' hidden size is 48; accepted: int8"):
        lowered(MOE, weights="int4")


def test_options_that_do_not_exist():
    with pytest.raises(ExportError, match="attention 'fast' doesn't exist; accepted: plugin, native"):
        PluginOptions(attention="fast")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="moe 'fast' doesn't exist"):
        PluginOptions(moe="fast")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="an int8 cache needs the plugin's attention"):
        PluginOptions(attention="native", int8_cache=True)
