"""What lowerings say about codes that they don't keep, and the flags that would."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import pytest

from qwen_aot.exporter.checkpoint.encoding import CodeForm, Encoding
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.encodings import encodings_kept, flags_that_keep, warn_of_rounding
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.lowering.ort.provider import Provider
from qwen_aot.exporter.lowering.tensorrt import plugin, standard
from qwen_aot.exporter.quantize.blockwise import BlockFormat
from qwen_aot.exporter.weights.recipe import Traced
from tests.exporter.graph.test_trace import DENSE

HALF = np.dtype(np.float16)
Q8_0 = Encoding("gguf-q8_0", CodeForm(8, 32, HALF))
MATRICES = 7 * DENSE.num_hidden_layers
traced_once = functools.cache(trace)


def traced(dtype: ir.DataType) -> Traced:
    once = traced_once(DENSE, dtype)
    sources = [source for recipe in once.recipes.values() for source in recipe.sources]
    encodings = {source.name: Q8_0 for source in sources if len(source.shape) == 2 and "layers" in source.name}
    assert len(encodings) == MATRICES
    return Traced(once.model.clone(), once.config, dict(once.recipes), encodings)


@pytest.mark.parametrize(
    ("lower", "options", "how"),
    [
        (standard.lower, standard.StandardOptions("int8"), "this target quantizes from floats"),
        (standard.lower, standard.StandardOptions(), "as float16"),
        (plugin.lower, plugin.PluginOptions("int4"), "this target quantizes from floats"),
    ],
)
def test_lowerings_for_tensorrt_keep_no_codes_and_it_is_said(lower, options, how):
    lowered = lower(traced(ir.DataType.FLOAT16), options)
    prefix = "tensors that the checkpoint stores quantized are rounded a second time: "
    assert warn_of_rounding(lowered) == (f"{prefix}{MATRICES} of gguf-q8_0 ({how})",)
    assert encodings_kept(lowered) == {}


def test_fp32_weights_round_nothing_but_bf16_ones_do():
    assert warn_of_rounding(standard.lower(traced(ir.DataType.FLOAT))) == ()
    (warning,) = warn_of_rounding(standard.lower(traced(ir.DataType.BFLOAT16)))
    assert warning.endswith("(as bfloat16)")


@pytest.mark.parametrize(
    ("form", "dtype", "ending"),
    [
        (CodeForm(6, 16, np.dtype(np.float32)), ir.DataType.FLOAT, "; --precision int8 --block-size 16 keeps the chec"),
        (CodeForm(6, 16, np.dtype(np.float32)), ir.DataType.FLOAT16, "don't fit 4 bits in blocks of 32)"),
        (CodeForm(4, 32, HALF, has_permutation=True), ir.DataType.FLOAT, "(their columns are in another order)"),
    ],
)
def test_flags_are_named_only_where_they_help(form, dtype, ending):
    lowered = traced(dtype)
    lowered.encodings = dict.fromkeys(lowered.encodings, Encoding("some", form))
    provider = Provider.CPU if dtype == ir.DataType.FLOAT else Provider.CUDA
    ort.lower(lowered, OrtOptions(BlockFormat(4, 32), accuracy_level=1, provider=provider))
    (warning,) = warn_of_rounding(lowered)
    assert ending in warning
    assert ("--precision" in warning) == ("--precision" in ending)


@pytest.mark.parametrize(
    ("forms", "flags"),
    [
        ([], None),
        ([CodeForm(8, 32, HALF)], "--precision int8 --block-size 32"),
        ([CodeForm(4, 128, HALF)], "--precision int4 --block-size 128"),
        ([CodeForm(4, 32, HALF), CodeForm(6, 16, HALF)], "--precision int8 --block-size 16"),
        ([CodeForm(4, 128, HALF, has_zero_points=True)], "--precision int4 --block-size 128 --asymmetric"),
        ([CodeForm(4, 24, HALF)], None),
    ],
)
def test_flags_hold_every_form(forms, flags):
    assert flags_that_keep([("model.layers.0.self_attn.q_proj.weight", form) for form in forms]) == flags


def test_sensitive_matrices_have_eight_bits_in_any_case():
    four, six = CodeForm(4, 32, HALF), CodeForm(6, 16, np.dtype(np.float32))
    forms = [("model.layers.0.self_attn.q_proj.weight", four), ("model.embed_tokens.weight", six)]
    assert flags_that_keep(forms) == "--precision int4 --block-size 16"
    assert flags_that_keep([*forms, ("model.layers.0.mlp.up_proj.weight", six)]) == "--precision int8 --block-size 16"


def test_the_flags_keep_what_is_kept_already():
    lowered = traced(ir.DataType.FLOAT)
    eight, six = Encoding("q8", CodeForm(8, 32, HALF)), Encoding("q6", CodeForm(6, 16, np.dtype(np.float32)))
    lowered.encodings = {**dict.fromkeys(lowered.encodings, eight), "model.embed_tokens.weight": six}
    ort.lower(lowered, OrtOptions(BlockFormat(4, 16), BlockFormat(8, 16), accuracy_level=1))
    (warning,) = warn_of_rounding(lowered)
    assert "q6" not in warning  # in 8-bit blocks of 16 it is kept
    assert warning.endswith("; --precision int8 --block-size 16 keeps the checkpoint's own numbers")
