"""Projections by the QwenLinear plugin: every number the checkpoint's, and products as the standard lowering's.

Its definition runs the graph on ONNX Runtime's CPU provider; the layout is that of docs/plugins.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.encoding import CodeForm, CodeType
from qwen_aot.exporter.graph.ops import DOMAIN
from qwen_aot.exporter.graph.plugin_ops import ATTRIBUTES, PluginOp
from qwen_aot.exporter.graph.save import save_graph
from qwen_aot.exporter.lowering.encodings import encodings_kept, warn_of_rounding
from qwen_aot.exporter.lowering.tensorrt import plugin
from qwen_aot.exporter.lowering.tensorrt.plugin_linear import pack_rows
from qwen_aot.exporter.quantize.own_codes import PluginLinear, plugin_linear
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.plugins.kernels import linear_reference
from tests.checkpoints import reference_logits, save_tiny
from tests.coded_checkpoints import BF16, WHOLE_ROW, CodedCheckpoint, Coding
from tests.exporter.graph.test_trace import DENSE
from tests.exporter.lowering.ort.test_own_codes import RELATIVE_BOUND, Written, difference, expected
from tests.exporter.lowering.tensorrt.test_own_codes import write
from tests.exporter.lowering.tensorrt.test_plugin import FP16_BOUND, export, lowered, stepped, tokens_of
from tests.exporter.rounded import int4, int8, rounded_model

FLOAT16 = ir.DataType.FLOAT16
OWN = plugin.PluginOptions(own_codes=True, linear="plugin")
SIZES: dict[str, Any] = {"hidden": 128, "intermediate": 256}

# --- float weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("linear") / "tiny"
    return folder, save_tiny(folder, hidden=128, intermediate=256, heads=4, kv_heads=2, layers=2)


def rounded(model: Any, weights: str) -> Any:
    """As `rounded_model`, with the plugin's int8: its scales are no multiples of a unit."""
    result = rounded_model(model, "fp16", rounds_rotary=False)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(int8(parameter, unit=1.0) if weights == "int8" else int4(parameter))
    return result


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("attention", ["plugin", "native"])
def test_float_weights_equal_transformers_with_the_same_rounded_ones(weights, attention, tiny, tmp_path):
    checkpoint, model = tiny
    ids = tokens_of(model)
    onnx_file = export(checkpoint, tmp_path, FLOAT16, weights=weights, linear="plugin", attention=attention)
    products = [node for node in onnx.load(onnx_file, load_external_data=False).graph.node if node.domain == DOMAIN]
    assert Counter(node.op_type for node in products)[PluginOp.LINEAR] == 8  # qkv, o, gate and up, down
    if attention == "native":  # whose window isn't as long as the cache
        return
    got = stepped(onnx_file, ids)
    want, own = (reference_logits(m, [ids])[0, 8:].numpy() for m in (rounded(model, weights), model))
    np.testing.assert_allclose(got, want, atol=FP16_BOUND, rtol=0)
    assert np.abs(got - own).max() > 2 * np.abs(got - want).max()  # weights were rounded


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_head_too_on_request(weights, tiny, tmp_path):
    checkpoint, model = tiny
    ids = tokens_of(model)
    quantized = export(checkpoint, tmp_path, FLOAT16, weights=weights, linear="plugin", quantize_head=True)
    same = rounded(model, weights)
    with torch.no_grad():
        head = same.lm_head.weight
        of_head = int8(head, unit=1.0) if weights == "int8" else int4(head)
        same.lm_head.weight = torch.nn.Parameter(of_head)
    np.testing.assert_allclose(
        stepped(quantized, ids), reference_logits(same, [ids])[0, 8:].numpy(), atol=FP16_BOUND, rtol=0
    )


HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
WIDE = dataclasses.replace(DENSE, hidden_size=128, intermediate_size=256, **HEADS)


def linear_nodes(traced: Traced) -> list[ir.Node]:
    return [node for node in traced.model.graph if node.op_type == PluginOp.LINEAR]


def stored(traced: Traced, layer: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        output.name.removeprefix(f"{layer}_"): (output.dtype.name, output.shape)
        for recipe in traced.recipes.values()
        for output in recipe.outputs
        if output.name.startswith(layer)
    }


def test_weights_are_stored_as_the_plugin_reads_them():
    down = "model.layers.0.mlp.down_proj.weight"
    traced = lowered(WIDE, weights="int4", linear="plugin")
    assert stored(traced, down) == {"codes": ("INT8", (64, 256)), "scales": ("FLOAT16", (2, 128))}
    for node in linear_nodes(traced):
        assert tuple(node.attributes) == ATTRIBUTES[PluginOp.LINEAR]
        assert node.attributes["weight_bits"].as_int() == 4 and node.attributes["group_size"].as_int() == 128
    traced = lowered(WIDE, weights="int8", linear="plugin")
    assert stored(traced, down) == {"codes": ("INT8", (128, 256)), "scales": ("FLOAT16", (1, 128))}
    assert {node.attributes["group_size"].as_int() for node in linear_nodes(traced)} == {-1}
    assert traced.model.graph.opset_imports[""] == 20  # of int8 nothing is left that needs a newer one


def test_weights_do_not_depend_on_how_a_checkpoint_is_cut_into_chunks():
    recipe = lowered(WIDE, weights="int4", linear="plugin").recipes["model.layers.0.mlp.down_proj.weight_codes"]
    assert recipe.rows_per_group % 16 == 0
    rows = np.random.default_rng(0).standard_normal((48, 256)).astype(np.float32)
    whole, parts = recipe.transform(rows), [recipe.transform(rows[:16]), recipe.transform(rows[16:])]
    for output, array, pieces in zip(recipe.outputs, whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(array, np.concatenate(pieces, axis=output.row_axis))


def test_sizes_that_the_plugin_does_not_take_keep_the_standard_form():
    """192 columns, which 128 doesn't divide: the down projection alone."""
    traced = lowered(dataclasses.replace(WIDE, intermediate_size=192), weights="int4", linear="plugin")
    counts = Counter(node.op_type for node in traced.model.graph)
    layers = WIDE.num_hidden_layers
    assert counts[PluginOp.LINEAR] == 3 * layers and counts["DequantizeLinear"] == layers
    assert traced.model.graph.opset_imports[""] == 21  # its blocks'


def test_what_is_parsed_has_no_definition_and_names_the_plugin(tmp_path):
    traced = lowered(WIDE, weights="int8", linear="plugin")
    overloads = {node.overload for node in linear_nodes(traced)}
    assert overloads == {"w8", "w8_bias"}
    assert plugin.strip_definitions(traced) == 5 * WIDE.num_hidden_layers  # with attention
    model = onnx.load(save_graph(traced, tmp_path), load_external_data=False)
    assert not model.functions
    for node in model.graph.node:
        if node.op_type == PluginOp.LINEAR:
            assert not node.overload
            fields = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            assert (fields["plugin_namespace"], fields["plugin_version"]) == (b"qwen_aot", b"1")
            assert len(node.input) == 3 + fields["has_zeros"] + fields["has_bias"]


@pytest.mark.parametrize(("weights", "found"), [(None, "in the compute type"), ("fp8", "fp8")])
def test_weights_that_the_plugin_does_not_read_are_refused(weights, found):
    with pytest.raises(ExportError, match=rf"linear plugin goes with weights of int4, int8, or .* are {found}; leave"):
        plugin.PluginOptions(weights, linear="plugin")
    with pytest.raises(ExportError, match="linear 'fast' doesn't exist; accepted: plugin, native"):
        plugin.PluginOptions("int4", linear="fast")  # type: ignore[arg-type]


# --- a checkpoint's own codes

CODINGS = {
    "4 bits": Coding(4, 128),
    "zero points": Coding(4, 128, zero_points=True),
    "blocks of 32, zero points": Coding(4, 32, zero_points=True),
    "3 bits in blocks of 64": Coding(3, 64),
    "whole rows": Coding(4, WHOLE_ROW),
    "whole rows, zero points": Coding(4, WHOLE_ROW, zero_points=True),
    "8 bits": Coding(8, 128),
    "whole rows of 8 bits": Coding(8, WHOLE_ROW),
    "bf16 scales": Coding(4, 128, scale_dtype=BF16),
    "one order an input": Coding(4, 64, permuted="by input"),
    "an order of its own each": Coding(4, 32, zero_points=True, permuted="by tensor"),
}


def matrices(onnx_file: Path) -> dict[str, np.ndarray]:
    """What each node multiplies by [N, K], by the weight's name: made by NumPy from the layout's definition."""
    written, found = Written(onnx_file), {}
    for node in written.nodes:
        if node.op_type != PluginOp.LINEAR:
            continue
        fields = {each.name: each.i for each in node.attribute}
        codes, scales = (written.arrays[name] for name in node.input[1:3])
        if fields["weight_bits"] == 8:
            numbers, zeros = codes.astype(np.float32), np.zeros((1, 1), np.float32)
        else:
            rows = 2 * len(codes)
            numbers = np.empty((rows, codes.shape[1]), np.float32)
            for row in range(rows):
                byte = codes.view(np.uint8)[row // 16 * 8 + row % 8]
                numbers[row] = byte >> 4 if row % 16 >= 8 else byte & 15
            zeros = written.arrays[node.input[3]].T if fields["has_zeros"] else np.full((1, 1), 8.0)
        size = codes.shape[1] // len(scales)
        assert fields["group_size"] in (size, -1) and (fields["group_size"] == -1) == (len(scales) == 1)
        wide_zeros = np.repeat(zeros.astype(np.float32), size, axis=1) if zeros.shape[1] > 1 else zeros
        values = (numbers - wide_zeros) * np.repeat(scales.astype(np.float32).T, size, axis=1)
        found[node.input[1].removesuffix("_codes")] = values.astype(np.float32)
    return found


@pytest.mark.parametrize("name", CODINGS)
def test_the_plugins_projections_are_the_checkpoints_bit_for_bit(name, tmp_path):
    source = CodedCheckpoint(CODINGS[name], **SIZES)
    traced, onnx_file = write(source, tmp_path, OWN)
    assert difference(source, onnx_file) < RELATIVE_BOUND
    found = matrices(onnx_file)
    assert found and not any(node.op_type == "DequantizeLinear" for node in Written(onnx_file).nodes)
    for weight, values in found.items():
        np.testing.assert_array_equal(values, expected(source, weight)[0], err_msg=weight)
    assert sum(encodings_kept(traced).values()) == len(source.coded)
    assert warn_of_rounding(traced) == ()


def test_one_changed_number_is_seen(tmp_path):
    source = CodedCheckpoint(CODINGS["zero points"], **SIZES)
    _, onnx_file = write(source, tmp_path, OWN)
    source.change("one code")
    differing = [
        weight
        for weight, values in matrices(onnx_file).items()
        if not np.array_equal(values, expected(source, weight)[0])
    ]
    assert differing == ["model.layers.1.self_attn.qkv_proj.weight"]


@pytest.mark.parametrize(
    "coding",
    [Coding(8, 64), Coding(8, 128, zero_points=True), Coding(4, 128, offsets=True), Coding(4, 16)],
    ids=["8 bits in blocks of 64", "8 bits, zero points", "minimums", "blocks of 16"],
)
def test_codes_without_a_form_keep_the_standard_one(coding, tmp_path):
    source = CodedCheckpoint(coding, **SIZES)
    _, onnx_file = write(source, tmp_path, OWN)
    assert not matrices(onnx_file)
    assert difference(source, onnx_file) < RELATIVE_BOUND


def form(bits: int, group: int, **facts: Any) -> CodeForm:
    return CodeForm(bits, group, np.dtype(np.float16), **facts)


@pytest.mark.parametrize(
    ("forms", "width", "found"),
    [
        ([form(4, 128)], 256, PluginLinear(4, 128)),
        ([form(4, 256)], 512, PluginLinear(4, 128)),
        ([form(3, 32), form(4, 64)], 256, PluginLinear(4, 32)),
        ([form(4, 256, has_zero_points=True)], 256, PluginLinear(4, None, True)),
        ([form(4, 512), form(8, 512)], 512, PluginLinear(8, None)),
        ([form(8, 256)], 512, PluginLinear(8, 128)),
        ([form(8, 64)], 512, None),
        ([form(4, 96)], 384, PluginLinear(4, 32)),
        ([form(4, 16)], 256, None),
        ([form(8, 512, has_zero_points=True)], 512, None),
        ([form(4, 128)], 192, None),
        ([form(4, 128, has_offsets=True)], 256, None),
        ([form(8, 256, has_input_scale=True)], 256, None),
        ([form(8, 256, code_type=CodeType.E4M3)], 256, None),
    ],
)
def test_the_form_that_holds_codes(forms, width, found):
    assert plugin_linear(forms, [32, 16], width) == found
    assert plugin_linear(forms, [32, 24], width) is None


# --- the layout


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_codes_are_packed_as_the_kernels_reference_unpacks_them(units, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (16 * units, columns), dtype=np.uint8)
    packed = pack_rows(codes)
    assert packed.dtype == np.int8 and packed.shape == (8 * units, columns)
    np.testing.assert_array_equal(linear_reference.unpack_rows(torch.from_numpy(packed)).numpy(), codes)
