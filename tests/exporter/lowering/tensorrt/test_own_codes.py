"""Checkpoints that fix their precision, as TensorRT's graph has them: every number theirs, and the products' results.

Codes, scales and offsets are read back out of the written graph; with x the input, block by block, the two products are
x * (code * scale) and x * offset, so that a weight is their sum. Graphs run on ONNX Runtime's CPU provider.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.storage import storage_of
from qwen_aot.exporter.graph.plugin_ops import EXPERT_BLOCK
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.encodings import encodings_kept, warn_of_rounding
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.quantize import own_codes
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from tests.coded_checkpoints import BF16, CODINGS, MOE, WHOLE_ROW, CodedCheckpoint, Coding, codings
from tests.exporter.lowering.ort.test_own_codes import RELATIVE_BOUND, Written, difference, expected, parts_of

traced_once = functools.cache(trace)
EMBEDDING = "model.embed_tokens.weight"
STANDARD, PLUGIN = standard.StandardOptions(own_codes=True), plugin.PluginOptions(own_codes=True)


def write(
    source: CodedCheckpoint,
    folder: Path,
    options: standard.StandardOptions | plugin.PluginOptions = STANDARD,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> tuple[Traced, Path]:
    folder.mkdir(exist_ok=True)
    once = traced_once(source.config, dtype)
    traced = Traced(once.model.clone(), once.config, dict(once.recipes))
    traced.store_as(storage_of(source))
    lowered = (
        plugin.lower(traced, options) if isinstance(options, plugin.PluginOptions) else standard.lower(traced, options)
    )
    stitch(lowered, source, folder / DATA_FILE)
    return lowered, save_graph(lowered, folder)


def assert_bit_equal(source: CodedCheckpoint, lowered: Traced, onnx_file: Path) -> None:
    """Each weight is the checkpoint's, where products and sums are exact: in fp64."""
    written, found = Written(onnx_file), set()
    attributes = {
        node.input[0]: {each.name: each.i for each in node.attribute}
        for node in written.nodes
        if node.op_type == "DequantizeLinear"
    }
    for codes in attributes:
        name = codes.removesuffix("_codes")
        found |= set(parts_of(source, name))
        size = attributes[codes]["block_size"]
        scales = np.repeat(written.arrays[f"{name}_scales"].astype(np.float64), size, axis=1)
        values = written.arrays[codes].astype(np.float64) * scales
        want, _ = expected(source, name)
        bits = max(source.coded[part].form.bits for part in parts_of(source, name))
        is_split = bits > 4 and size < want.shape[1]  # then two codes of 4 bits
        assert len(values) == (2 if is_split else 1) * len(want)
        if is_split:
            values = 16 * values[0::2] + values[1::2]
        offsets = written.arrays.get(f"{name}_offsets")
        if offsets is not None:
            values += np.repeat(offsets.astype(np.float64), size, axis=1)
        np.testing.assert_array_equal(values.astype(np.float32), want, err_msg=name)
    assert found == source.coded.keys() - {EMBEDDING}  # which is floats in TensorRT's graph


@pytest.mark.parametrize("name", codings())
def test_a_dense_model_is_the_checkpoints_bit_for_bit(name, tmp_path):
    source = CodedCheckpoint(CODINGS[name])
    lowered, onnx_file = write(source, tmp_path)
    assert_bit_equal(source, lowered, onnx_file)
    assert difference(source, onnx_file) < RELATIVE_BOUND
    assert sum(encodings_kept(lowered).values()) == len(source.coded.keys() - {EMBEDDING})
    assert warn_of_rounding(lowered) == ()


@pytest.mark.parametrize("name", ["bf16 scales", "4 bits, zero points", "mixed", "minimums"])
@pytest.mark.parametrize("options", [STANDARD, PLUGIN], ids=["standard", "plugin"])
def test_in_fp16_the_numbers_are_the_same(name, options, tmp_path):
    source = CodedCheckpoint(CODINGS[name])
    lowered, onnx_file = write(source, tmp_path, options, ir.DataType.FLOAT16)
    assert_bit_equal(source, lowered, onnx_file)
    assert difference(source, onnx_file) < 0.05  # activations of 11 bits
    parts = {part: value.dtype for name, value in lowered.model.graph.initializers.items() if (part := name[-6:])}
    assert parts["scales"] == ir.DataType.FLOAT16
    if name != "bf16 scales":
        assert parts["ffsets"] == ir.DataType.FLOAT


@pytest.mark.parametrize("kind", ["zero point", "one code", "one scale", "one offset", "two columns"])
def test_one_changed_number_is_seen(kind, tmp_path):
    source = CodedCheckpoint(CODINGS["minimums" if kind == "one offset" else "an order of its own each"])
    lowered, onnx_file = write(source, tmp_path)
    source.change(kind)
    if kind == "two columns":  # of codes that are the same in their own order
        assert difference(source, onnx_file) > RELATIVE_BOUND
    else:
        with pytest.raises(AssertionError):
            assert_bit_equal(source, lowered, onnx_file)


def test_a_scale_of_0_becomes_one_that_tensorrt_takes(tmp_path):
    source = CodedCheckpoint(Coding(4, 32, zero_points=True))
    name = "model.layers.0.self_attn.o_proj.weight"
    source.coded[name].scales[3, 1] = 0
    source.remake()
    lowered, onnx_file = write(source, tmp_path)
    assert_bit_equal(source, lowered, onnx_file)
    assert (Written(onnx_file).arrays[f"{name}_scales"] > 0).all()


def test_a_negative_scale_is_refused_by_its_place(tmp_path):
    source = CodedCheckpoint(Coding(4, 32))
    source.coded["model.layers.0.self_attn.k_proj.weight"].scales[7, 1] *= -1
    with pytest.raises(ExportError, match=r"k_proj\.weight, row 7: a scale of -\S+ is negative.*accepted: codes with"):
        write(source, tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp32 scales": ({"coding": Coding(scale_dtype=np.dtype(np.float32))}, "float32 scales, which float16 doesn't hold"),
    "blocks that don't divide K": ({"coding": Coding(4, 128), "intermediate": 200}, "with rows of 200, is stored as 4"),
}


@pytest.mark.parametrize("options", [STANDARD, PLUGIN], ids=["standard", "plugin"])
@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_what_tensorrt_does_not_hold_is_refused_by_name(model, message, options, tmp_path):
    with pytest.raises(ExportError, match=message):
        write(CodedCheckpoint(**model), tmp_path, options, ir.DataType.FLOAT16)


def test_the_head_is_quantized_on_request(tmp_path):
    source = CodedCheckpoint(Coding())
    lowered, onnx_file = write(source, tmp_path, dataclasses.replace(STANDARD, quantize_head=True))
    assert lowered.model.graph.initializers["lm_head.weight_codes"].dtype == ir.DataType.INT8
    assert RELATIVE_BOUND < difference(source, onnx_file) < 0.1


WIDE: dict[str, Any] = {"moe": MOE | {"moe_intermediate_size": 256}}  # blocks of 128 divide every width
EXPERTS = {
    "4 bits": Coding(4, 128),
    "zero points": Coding(4, 128, zero_points=True),
    "3 bits in groups of 256": Coding(3, 256, zero_points=False),
    "whole rows of 8 bits": Coding(8, WHOLE_ROW),
    "one order an input": Coding(4, 128, zero_points=True, permuted="by input"),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_the_plugins_experts_are_the_checkpoints_bit_for_bit(name, tmp_path):
    """Its definition runs the graph; the layout is that of docs/plugins.md."""
    source = CodedCheckpoint(EXPERTS[name], **WIDE)
    lowered, onnx_file = write(source, tmp_path, PLUGIN)
    assert difference(source, onnx_file) < RELATIVE_BOUND
    assert sum(encodings_kept(lowered).values()) == len(source.coded)
    written = Written(onnx_file)
    nodes = [node for node in written.nodes if node.op_type == "QwenMoE"]
    assert len(nodes) == 2
    for node in nodes:
        for position in (3, 4):
            codes, scales = (written.arrays[node.input[index]] for index in (position, position + 2))
            if "8 bits" in name:
                values = codes.astype(np.float32) * scales[..., None].astype(np.float32)
            else:
                pairs = np.stack((codes.view(np.uint8) % 16, codes.view(np.uint8) // 16), axis=-1)
                numbers = pairs.reshape(*codes.shape[:2], -1, EXPERT_BLOCK).astype(np.float32)
                zeros = written.arrays[node.input[position + 4]][..., None] if len(node.input) > 7 else 8
                values = ((numbers - zeros) * scales[..., None].astype(np.float32)).reshape(*codes.shape[:2], -1)
            weight = node.input[position].removesuffix("_codes")
            want, _ = expected(source, weight)
            if position == 3:  # the plugin has gate rows first, `expected` has them by turns
                want = want.reshape(len(want), -1, 2, want.shape[-1]).swapaxes(1, 2).reshape(want.shape)
            np.testing.assert_array_equal(values, want, err_msg=weight)


NO_EXPERTS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "standard": ({"coding": Coding(), **WIDE}, STANDARD, r"experts\.0\.gate_proj\.weight is stored as test-int4-g128"),
    "native": (
        {"coding": Coding(), **WIDE},
        plugin.PluginOptions(own_codes=True, moe="native"),
        r"accepted: target cpu, target tensorrt with the QwenMoE plugin",
    ),
    "groups of 64": (
        {"coding": Coding(4, 64), **WIDE},
        PLUGIN,
        "4 bits in groups of 64, and the QwenMoE plugin has 4 bits",
    ),
    "groups of 8 bits": ({"coding": Coding(8, 128), **WIDE}, PLUGIN, "8 bits with one scale a row and no zero points"),
    "an odd width": ({"coding": Coding(4, 128), "moe": MOE}, PLUGIN, "the hidden and the intermediate size must be"),
    "minimums": ({"coding": Coding(4, 128, offsets=True), **WIDE}, PLUGIN, "groups of 128 with minimums, and the Qwen"),
    "orders": (
        {"coding": Coding(4, 128, permuted="by tensor"), **WIDE},
        PLUGIN,
        "have their columns in different orders .g_idx of act-order",
    ),
}


@pytest.mark.parametrize(("model", "options", "message"), NO_EXPERTS.values(), ids=NO_EXPERTS)
def test_experts_without_a_form_are_refused_with_what_is_accepted(model, options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        write(CodedCheckpoint(**model), tmp_path, options)


def test_the_planners_expert_block_is_the_plugins():
    assert own_codes.EXPERT_BLOCK == EXPERT_BLOCK


@pytest.mark.parametrize(("options", "model"), [(STANDARD, {}), (PLUGIN, WIDE)], ids=["standard", "plugin"])
def test_a_value_beyond_fp16_is_refused_by_its_place(options, model, tmp_path):
    source = CodedCheckpoint(Coding(4, 128), **model)
    name = next(name for name in source.coded if "mlp" in name and "up_proj" in name)
    source.coded[name].scales[3, 0], source.coded[name].codes[3, 0] = 20_000, 0
    with pytest.raises(ExportError, match=rf"{name}, row 3: a weight of magnitude 1\S+ doesn't fit float16"):
        write(source, tmp_path, options, ir.DataType.FLOAT16)


@pytest.mark.parametrize(("options", "model"), [(STANDARD, {}), (PLUGIN, WIDE)], ids=["standard", "plugin"])
def test_a_scale_of_bfloat16_that_fp16_lacks_is_refused_by_its_place(options, model, tmp_path):
    source = CodedCheckpoint(Coding(4, 128, scale_dtype=BF16), **model)
    name = next(name for name in source.coded if "mlp" in name and "up_proj" in name)
    source.coded[name].scales[5, 0] = 1.1e-7
    with pytest.raises(ExportError, match=rf"{name}, row 5: a scale of 1\S+e-07 is no float16 number"):
        write(source, tmp_path, options, ir.DataType.FLOAT16)
