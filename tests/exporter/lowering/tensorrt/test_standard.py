"""The standard lowering in every precision: what it stores, what it refuses, its numbers against transformers."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.tensorrt import standard
from qwen_aot.exporter.lowering.tensorrt.standard import StandardOptions
from qwen_aot.exporter.lowering.widen import widen_bf16
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from tests.checkpoints import reference_logits, save_tiny
from tests.exporter.cases import CASES
from tests.exporter.graph.test_trace import DENSE, MOE
from tests.exporter.rounded import int8, rounded_model
from tests.exporter.stepper import Stepper

FLOAT16, BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)
WIDE = dataclasses.replace(DENSE, hidden_size=128, intermediate_size=160, head_dim=32)

# Against fp32 logits (std 1) of a model with the same rounded weights: activations rounded to 11 bits; seen below 6e-3.
SAME_WEIGHTS_BOUND = 2e-2
# Against the checkpoint's own weights: random ones, which rounding hurts more than trained ones; seen: half of each.
ROUNDING_BOUNDS = {"fp16": 2e-2, "int8": 0.4, "fp8": 1.0, "int4": 4.0}
WIDENED_BOUND = 1e-3  # the same fp32 products summed in another order


def export(checkpoint: Path, folder: Path, precision: str) -> Path:
    """The graph that TensorRT parses, at one precision; bf16 widened to fp32, since it can't be run here."""
    folder.mkdir(exist_ok=True, parents=True)
    weights = precision if precision in ("int8", "int4", "fp8") else None
    with open_checkpoint(checkpoint) as source:
        traced = trace(source.config, BFLOAT16 if precision == "bf16" else FLOAT16)
        standard.lower(traced, StandardOptions(weights))  # type: ignore[arg-type]
        if precision == "bf16":
            assert widen_bf16(traced) > 0
        stitch(traced, source, folder / DATA_FILE)
        return save_graph(traced, folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Case -> (checkpoint folder, transformers model), each made once."""
    root = tmp_path_factory.mktemp("standard")

    @functools.cache
    def make(case: str) -> tuple[Path, Any]:
        return root / case, save_tiny(root / case, **CASES[case])

    return make


def stepped(onnx_file: Path, ids: list[int]) -> np.ndarray:
    """Logits of a prefill of 9 tokens, then one token a step."""
    stepper = Stepper(onnx_file, rows=1, capacity=24)
    return np.stack([stepper.step([ids[:9]])[0]] + [stepper.step([[token]])[0] for token in ids[9:]])


def compared(models: Any, case: str, precision: str, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of the graph, of transformers with the same rounded weights, of transformers as it is."""
    checkpoint, model = models(case)
    # Not 1, at which a router of moe_mixed has two experts within 11 bits of each other: either choice is right.
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, 17).tolist()
    got = stepped(export(checkpoint, folder, precision), ids)
    same, own = (reference_logits(m, [ids])[0, 8:].numpy() for m in (rounded_model(model, precision), model))
    return got, same, own


DENSE_CASES = [case for case, arguments in CASES.items() if "moe" not in arguments]
RUN = [(case, "fp16") for case in CASES] + [(case, form) for case in DENSE_CASES for form in ("int8", "int4", "fp8")]


@pytest.mark.parametrize(("case", "precision"), RUN)
def test_logits_equal_transformers_with_the_same_rounded_weights(case, precision, models, tmp_path):
    got, same, own = compared(models, case, precision, tmp_path)
    np.testing.assert_allclose(got, same, atol=SAME_WEIGHTS_BOUND, rtol=0)
    np.testing.assert_allclose(got, own, atol=ROUNDING_BOUNDS[precision], rtol=0)
    if precision != "fp16":
        assert np.abs(got - own).max() > 2 * np.abs(got - same).max()  # the weights were rounded


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_widened_to_fp32_equals_transformers_with_bfloat16_weights(case, models, tmp_path):
    """ONNX Runtime has no bfloat16 MatMul: `widen_bf16` keeps the weights' values and computes in fp32."""
    got, same, own = compared(models, case, "bf16", tmp_path)
    np.testing.assert_allclose(got, same, atol=WIDENED_BOUND, rtol=0)
    assert np.abs(got - own).max() > WIDENED_BOUND


# --- what is stored


def op_counts(traced: Traced) -> Counter[str]:
    return Counter(node.op_type for node in traced.model.graph)


def lowered(config: Any, weights: Any, *, quantize_head: bool = False) -> Traced:
    return standard.lower(trace(config, FLOAT16, capacity=64), StandardOptions(weights, quantize_head))


def stored(traced: Traced) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        output.name.removeprefix("model.layers.0."): (output.dtype.name, output.shape)
        for recipe in traced.recipes.values()
        for output in recipe.outputs
        if output.name.startswith("model.layers.0.") and "norm" not in output.name
    }


def test_int8_has_a_scale_an_output_channel_behind_the_product():
    graph = stored(lowered(DENSE, "int8"))
    n, m = DENSE.num_attention_heads * DENSE.head_dim, DENSE.hidden_size
    assert graph["self_attn.o_proj.weight_codes"] == ("INT8", (m, n))
    assert graph["self_attn.o_proj.weight_scales"] == ("FLOAT16", (m,))
    assert "self_attn.qkv_proj.bias" in graph
    assert "self_attn.o_proj.weight" not in graph


def test_fp8_is_e4m3():
    assert stored(lowered(DENSE, "fp8"))["mlp.down_proj.weight_codes"][0] == "FLOAT8E4M3FN"


def test_int4_blocks_are_the_largest_that_divide_the_row_and_int8_where_none_does():
    graph = stored(lowered(WIDE, "int4"))
    assert graph["mlp.gate_up_proj.weight_codes"] == ("INT4", (320, 128))
    assert graph["mlp.gate_up_proj.weight_scales"] == ("FLOAT16", (320, 1))
    assert graph["mlp.down_proj.weight_scales"] == ("FLOAT16", (128, 5))  # 160 = 5 * 32
    odd = stored(lowered(dataclasses.replace(WIDE, intermediate_size=40), "int4"))
    assert odd["mlp.down_proj.weight_codes"] == ("INT8", (128, 40))


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("config", [DENSE, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("quantize_head", [False, True])
def test_head_and_embedding_keep_the_compute_type_unless_asked(config, weights, quantize_head):
    traced = lowered(config, weights, quantize_head=quantize_head)
    per_layer = 4
    expected = per_layer * config.num_hidden_layers + quantize_head
    assert op_counts(traced)["DequantizeLinear"] == expected
    names = {output.name for recipe in traced.recipes.values() for output in recipe.outputs}
    assert "model.embed_tokens.weight" in names
    assert ("lm_head.weight" in names) == (not config.tie_word_embeddings and not quantize_head)
    assert names == set(traced.model.graph.initializers)


def test_quantized_weights_do_not_depend_on_how_a_checkpoint_is_cut_into_chunks(tmp_path):
    save_tiny(tmp_path / "checkpoint", **CASES["gqa"])
    with open_checkpoint(tmp_path / "checkpoint") as source:
        traced = lowered(source.config, "int4")
        (recipe,) = [r for name, r in traced.recipes.items() if name.endswith("0.mlp.down_proj.weight_codes")]
        rows = source.read(recipe.sources[0].name)
    whole = recipe.transform(rows)
    parts = [recipe.transform(rows[:7]), recipe.transform(rows[7:])]
    for index, array in enumerate(whole):
        np.testing.assert_array_equal(array, np.concatenate([part[index] for part in parts]))


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_experts_are_refused_by_name(weights):
    with pytest.raises(ExportError, match=f"{weights} weights of a mixture of experts .* QwenMoE plugin"):
        lowered(MOE, weights)


def test_an_unknown_format_is_refused():
    with pytest.raises(ExportError, match="'int3' doesn't exist; accepted: int8, int4, fp8"):
        StandardOptions("int3")  # type: ignore[arg-type]


# --- passes


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, FLOAT16, BFLOAT16], ids=lambda dtype: dtype.name)
def test_attention_asks_for_no_softmax_precision(dtype):
    graph = standard.lower(trace(DENSE, dtype)).model.graph
    attention = [node for node in graph if node.op_type == "Attention"]
    assert len(attention) == DENSE.num_hidden_layers
    assert all(set(node.attributes) == {"scale"} for node in attention)


def test_gate_and_up_are_gathered_not_split():
    graph = lowered(DENSE, None).model.graph
    sigmoids = [node for node in graph if node.op_type == "Sigmoid"]
    assert len(sigmoids) == DENSE.num_hidden_layers
    for node in sigmoids:
        gather = node.inputs[0].producer()
        assert gather is not None and gather.op_type == "Gather"
        index = gather.inputs[1].producer().attributes["value"].as_tensor()
        np.testing.assert_array_equal(index.numpy(), np.arange(DENSE.intermediate_size))
        assert index.dtype == ir.DataType.INT32


def test_no_op_is_left_that_torch_exports_oddly():
    counts = op_counts(lowered(DENSE, None))
    assert not {"CastLike", "Clip", "Expand", "LessOrEqual"} & set(counts)


def test_widening_leaves_no_bfloat16_and_twice_changes_nothing():
    traced = standard.lower(trace(DENSE, BFLOAT16))
    assert widen_bf16(traced) > 0
    assert widen_bf16(traced) == 0
    graph = traced.model.graph
    assert all(
        value.dtype != BFLOAT16 for node in graph for value in (*node.inputs, *node.outputs) if value is not None
    )
    assert all(output.dtype != BFLOAT16 for recipe in traced.recipes.values() for output in recipe.outputs)


def test_widening_leaves_float16_alone():
    assert widen_bf16(lowered(DENSE, None)) == 0


def test_a_tied_quantized_head_equals_the_rounded_embedding(models, tmp_path):
    """Stored beside the embedding, which is looked up in fp16."""
    checkpoint, model = models("tied")
    with open_checkpoint(checkpoint) as source:
        traced = lowered(source.config, "int8", quantize_head=True)
        stitch(traced, source, tmp_path / DATA_FILE)
        onnx_file = save_graph(traced, tmp_path)
    reference = rounded_model(model, "int8")
    ids = [5, 3, 8]
    with torch.no_grad():
        hidden = reference.model(torch.tensor([ids])).last_hidden_state[0, -1]
        want = int8(model.lm_head.weight.half().float()) @ hidden
    got = Stepper(onnx_file, rows=1, capacity=64).step([ids])[0]
    np.testing.assert_allclose(got, want, atol=SAME_WEIGHTS_BOUND, rtol=0)
