"""A GGUF file's own codes in the ort lowering: bit for bit in the initializers, and in the logits.

What the initializers stand for is worked out here from the layouts in the documentation of ONNX Runtime's operators and
compared with what the gguf package dequantizes.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType as Type
from onnx import numpy_helper

from qwen_aot.errors import ExportError
from qwen_aot.exporter.checkpoint.base import encodings_of
from qwen_aot.exporter.checkpoint.open import open_checkpoint
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.encodings import encodings_kept, warn_of_rounding
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.lowering.ort.provider import Provider
from qwen_aot.exporter.quantize.blockwise import BlockFormat
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from tests.checkpoints import reference_logits, tiny_config, tiny_model
from tests.exporter.checkpoint.test_formats import load
from tests.exporter.lowering.ort.test_contrib import EXACT_BOUND, stepped_logits
from tests.exporter.stepper import Stepper
from tests.gguf_files import save_gguf

INT8, INT4 = BlockFormat(8, 32), BlockFormat(4, 32)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-gqa-tied": ("qwen2", {"kv_heads": 2, "tied": True, "vocab": 97}),
    "llama-gqa": ("llama", {"kv_heads": 2}),  # rows of q and k lie in another order
    "moe": ("qwen2moe", {"moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}}),
}
KEPT = {  # type of the file -> formats that hold it exactly
    "Q8_0": {"int8": OrtOptions(INT8), "blocks of 16": OrtOptions(BlockFormat(8, 16))},
    "Q4_0": {
        "int4": OrtOptions(INT4),
        "sensitive at 8 bits": OrtOptions(INT4, INT8),
        "zero points": OrtOptions(BlockFormat(4, 32, symmetric=False)),
        "int8": OrtOptions(INT8),
    },
    "Q5_0": {"int8": OrtOptions(INT8)},
}
CASES = [(kind, name) for kind, options in KEPT.items() for name in options]


class Export:
    """A tiny GGUF file, the graph made of it, and the weights that both stand for."""

    def __init__(self, folder: Path, case: str, kind: str, options: OrtOptions, **kinds: Type) -> None:
        architecture, shape = MODELS[case]
        self.model = tiny_model(tiny_config(**shape))
        self.file = folder / "model.gguf"
        endings = {name.replace("__", "."): each for name, each in kinds.items()}
        self.written = save_gguf(self.file, self.model, architecture, kind=Type[kind], kinds=endings)
        self.lowered, self.onnx_file = write(self.file, folder, options)

    def values(self) -> dict[str, np.ndarray]:
        """Every quantized matrix in the graph, by the name of its initializers."""
        return decoded(self.onnx_file)

    def expected(self, name: str) -> np.ndarray:
        """What the file stands for, stacked as the graph has it."""
        return stacked(self.written, name)


traced_once = functools.cache(trace)


def write(file: Path, folder: Path, options: OrtOptions, dtype: ir.DataType = ir.DataType.FLOAT) -> tuple[Traced, Path]:
    with open_checkpoint(file) as source:
        once = traced_once(source.config, dtype)
        traced = Traced(once.model.clone(), once.config, dict(once.recipes), encodings_of(source))
        lowered = ort.lower(traced, options)
        stitch(lowered, source, folder / DATA_FILE)
        return lowered, save_graph(lowered, folder)


def decoded(onnx_file: Path) -> dict[str, np.ndarray]:
    """(code - zero point) * scale of each MatMulNBits, GatherBlockQuantized and QMoE, as their documentation has it."""
    graph = onnx.load(onnx_file).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    found: dict[str, np.ndarray] = {}
    for node in graph.node:
        attributes = {each.name: each.i for each in node.attribute}
        if node.op_type == "QMoE":
            bits = attributes["expert_weight_bits"]
            for codes, scales, zeros in ((2, 3, 11), (5, 6, 12)):
                name = node.input[codes]
                packed_zeros = arrays.get(node.input[zeros]) if len(node.input) > zeros else None
                found[name] = blocks_of(arrays[name], arrays[node.input[scales]], packed_zeros, bits)
        elif node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            is_table, zeros = node.op_type == "GatherBlockQuantized", 3
            name, scale = node.input[0 if is_table else 1], node.input[2]
            if scale not in arrays:  # a view
                scale = producers[scale].input[0]
            zero = arrays.get(node.input[zeros]) if len(node.input) > zeros else None
            if zero is not None and is_table:
                assert zero.shape[-1] == 1  # one a byte
                zero = pack_row(zero[..., 0], attributes["bits"])
            values = blocks_of(arrays[name].reshape(len(arrays[name]), -1), arrays[scale], zero, attributes["bits"])
            assert name not in found or np.array_equal(found[name], values)  # a tied head and the embedding
            found[name] = values
    return {name.removesuffix("_codes"): values for name, values in found.items()}


def blocks_of(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int) -> np.ndarray:
    """Codes [..., bytes], scales [..., n], packed zero points [..., bytes] -> values [..., K]."""
    scales = scales.reshape(*codes.shape[:-1], -1)
    numbers = unpack_row(codes, bits)
    size = numbers.shape[-1] // scales.shape[-1]
    if zeros is None:
        zero: Any = 8 if bits == 4 else 128
    else:
        zero = np.repeat(unpack_row(zeros, bits)[..., : scales.shape[-1]], size, axis=-1).astype(np.int32)
    return (numbers.astype(np.int32) - zero).astype(np.float32) * np.repeat(scales, size, axis=-1).astype(np.float32)


def unpack_row(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    result = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    result[..., 0::2], result[..., 1::2] = packed % 16, packed // 16
    return result


def pack_row(numbers: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return numbers
    even = np.pad(numbers, [(0, 0), (0, numbers.shape[-1] % 2)])
    return even[:, 0::2] + 16 * even[:, 1::2]


def stacked(weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """An initializer's rows from the checkpoint's tensors; experts' gate and up rows by turns."""
    if name.endswith("experts_gate_up"):
        prefix = name.removesuffix("experts_gate_up")
        count = sum(f"{prefix}experts." in each and "gate_proj" in each for each in weights)
        pairs = [[weights[f"{prefix}experts.{e}.{part}_proj.weight"] for part in ("gate", "up")] for e in range(count)]
        return np.stack([np.stack(pair, axis=1).reshape(-1, pair[0].shape[1]) for pair in pairs])
    if name.endswith("experts_down"):
        prefix = name.removesuffix("experts_down")
        count = sum(f"{prefix}experts." in each and "down_proj" in each for each in weights)
        return np.stack([weights[f"{prefix}experts.{e}.down_proj.weight"] for e in range(count)])
    for joined, parts in (("qkv_proj", "q k v"), ("gate_up_proj", "gate up")):
        if joined in name:
            return np.concatenate([weights[name.replace(joined, f"{part}_proj")] for part in parts.split()])
    return weights[name]


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_weights_are_the_files_bit_for_bit(case, kind, name, tmp_path):
    export = Export(tmp_path, case, kind, KEPT[kind][name])
    values = export.values()
    layers, ends = 2, 1 if "tied" in case else 2  # a tied head is the embedding
    a_layer = 6 if case == "moe" else 4  # q|k|v, o, gate|up, down; experts' gate|up and down
    assert len(values) == layers * a_layer + ends
    for weight, found in values.items():
        expected = export.expected(weight)
        np.testing.assert_array_equal(found[..., : expected.shape[-1]], expected, err_msg=weight)
        assert not found[..., expected.shape[-1] :].any()
    encodings = export.lowered.encodings
    floats = [each for each in encodings if each.endswith("mlp.gate.weight")]  # routers are fp32
    assert encodings_kept(export.lowered) == {f"gguf-{kind.lower()}": len(encodings) - len(floats)}
    assert warn_of_rounding(export.lowered) == ()


@pytest.mark.parametrize(
    ("case", "kind", "options"),
    [
        ("qwen2", "Q8_0", OrtOptions(INT8, accuracy_level=1)),
        ("qwen2-gqa-tied", "Q8_0", OrtOptions(INT8, accuracy_level=1)),
        ("llama-gqa", "Q4_0", OrtOptions(INT4, accuracy_level=1)),
        ("qwen2-gqa-tied", "Q4_0", OrtOptions(INT4, INT8, accuracy_level=1)),
        ("moe", "Q4_0", OrtOptions(INT4, accuracy_level=1)),  # eight-bit experts have no fp32 kernel
    ],
)
def test_logits_are_those_of_the_files_weights(case, kind, options, tmp_path):
    export = Export(tmp_path, case, kind, options)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    load(export.model, export.written)
    want = reference_logits(export.model, [ids])[0, 5:].numpy()
    got = stepped_logits(export.onnx_file, ids, 6)
    assert np.abs(got - want).max() < EXACT_BOUND
    other = copy.deepcopy(export.written)  # and the bound sees one scale of one block
    block = other["model.layers.1.self_attn.o_proj.weight"][:8, :32]
    block *= 2
    load(export.model, other)
    assert np.abs(got - reference_logits(export.model, [ids])[0, 5:].numpy()).max() > EXACT_BOUND


@pytest.mark.parametrize(("kind", "options"), [("Q8_0", OrtOptions(INT8)), ("Q4_0", OrtOptions(INT4))])
def test_one_flipped_bit_of_the_file_is_seen(kind, options, tmp_path):
    export = Export(tmp_path, "qwen2", kind, options)
    name = "model.layers.0.self_attn.o_proj.weight"
    (tensor,) = (each for each in gguf.GGUFReader(export.file).tensors if each.name == "blk.0.attn_output.weight")
    content = bytearray(export.file.read_bytes())
    for what, offset in (("scale", 1), ("code", 2)):
        damaged = bytearray(content)
        damaged[tensor.data_offset + offset] ^= 0x10
        export.file.write_bytes(damaged)
        (tmp_path / what).mkdir()
        _, onnx_file = write(export.file, tmp_path / what, options)
        found = decoded(onnx_file)[name]
        assert not np.array_equal(found, export.expected(name))
        assert np.array_equal(found[1:], export.expected(name)[1:])


def test_experts_are_padded_with_zeros(tmp_path):
    """Gate and up rows are codes, while down projections of 48 columns, which no block of the file divides, are not."""
    shape = MODELS["moe"][1] | {"moe": MODELS["moe"][1]["moe"] | {"moe_intermediate_size": 48}}
    model = tiny_model(tiny_config(**shape))
    file = tmp_path / "m.gguf"
    written = save_gguf(file, model, "qwen2moe", kind=Type.Q4_0, kinds={".experts.down_proj.weight": Type.F16})
    lowered, onnx_file = write(file, tmp_path, OrtOptions(INT4))
    found = decoded(onnx_file)["model.layers.0.mlp.experts_gate_up"]
    expected = stacked(written, "model.layers.0.mlp.experts_gate_up")
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert found.shape[1] == 128 and not found[:, expected.shape[1] :].any()
    assert warn_of_rounding(lowered) == ()  # nothing that was quantized


REQUANTIZED = {
    "8 bits as 4": ("Q8_0", OrtOptions(INT4), "8 bits in blocks of 32 don't fit 4 bits in blocks of 32", "int8"),
    "wider blocks": (
        "Q4_0",
        OrtOptions(BlockFormat(4, 64)),
        "4 bits in blocks of 32 don't fit 4 bits in blocks of 64",
        "int4",
    ),
}


@pytest.mark.parametrize(("kind", "options", "reason", "precision"), REQUANTIZED.values(), ids=REQUANTIZED)
def test_another_format_is_said_and_made_from_floats(kind, options, reason, precision, tmp_path, caplog):
    export = Export(tmp_path, "qwen2", kind, options)
    caplog.clear()
    (warning,) = warn_of_rounding(export.lowered)
    assert [record.getMessage() for record in caplog.records] == [warning]
    count = len(export.lowered.encodings)
    assert warning == (
        f"tensors that the checkpoint stores quantized are rounded a second time: {count} of gguf-{kind.lower()} "
        f"({reason}); --precision {precision} --block-size 32 keeps the checkpoint's own numbers"
    )
    assert encodings_kept(export.lowered) == {}
    # The same bytes as of the same values in fp32.
    model = copy.deepcopy(export.model)
    load(model, export.written)
    (tmp_path / "plain").mkdir()
    save_gguf(tmp_path / "plain" / "m.gguf", model, "qwen2")
    write(tmp_path / "plain" / "m.gguf", tmp_path / "plain", options)
    assert (tmp_path / "plain" / DATA_FILE).read_bytes() == (tmp_path / DATA_FILE).read_bytes()


def test_sensitive_matrices_may_be_kept_alone(tmp_path):
    export = Export(tmp_path, "qwen2", "Q8_0", OrtOptions(INT4, INT8))
    assert encodings_kept(export.lowered) == {"gguf-q8_0": 4}  # embedding, head, two down projections
    (warning,) = warn_of_rounding(export.lowered)
    assert "12 of gguf-q8_0" in warning
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(export.values()[name], export.expected(name))


def test_a_stack_of_two_types_is_kept_where_both_fit(tmp_path):
    export = Export(tmp_path, "llama-gqa", "Q4_0", OrtOptions(INT8), v_proj__weight=Type.Q8_0)
    assert warn_of_rounding(export.lowered) == ()
    name = "model.layers.0.self_attn.qkv_proj.weight"
    np.testing.assert_array_equal(export.values()[name], export.expected(name))
    assert encodings_kept(export.lowered) == {"gguf-q4_0": 14, "gguf-q8_0": 2}


MIXED = {
    "not codes": (
        Type.F16,
        "4 of gguf-q4_0 (stacked with tensors whose codes don't fit)",
        "; --own-codes keeps the checkpoint's own numbers",
    ),
    "minimums": (
        Type.Q4_1,
        "4 of gguf-q4_0 (stacked with tensors whose codes don't fit); "
        "2 of gguf-q4_1 (they have minimums, and these blocks have none)",
        "; --own-codes keeps the checkpoint's own numbers",
    ),
    "too many bits": (
        Type.Q8_0,
        "4 of gguf-q4_0 (stacked with tensors whose codes don't fit); "
        "2 of gguf-q8_0 (8 bits in blocks of 32 don't fit 4 bits in blocks of 32)",
        "; --precision int8 --block-size 32 keeps the checkpoint's own numbers",
    ),
}


@pytest.mark.parametrize(("other", "what", "remedy"), MIXED.values(), ids=MIXED)
def test_a_stack_is_made_from_floats_where_a_part_does_not_fit(other, what, remedy, tmp_path):
    export = Export(tmp_path, "llama-gqa", "Q4_0", OrtOptions(INT4), v_proj__weight=other)
    expected = f"tensors that the checkpoint stores quantized are rounded a second time: {what}{remedy}"
    assert warn_of_rounding(export.lowered) == (expected,)
    assert encodings_kept(export.lowered) == {"gguf-q4_0": 10}
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert not np.array_equal(export.values()[name], export.expected(name))


def test_what_no_asked_for_blocks_hold_is_said_once(tmp_path):
    export = Export(tmp_path, "qwen2", "Q4_1", OrtOptions(INT8))
    (warning,) = warn_of_rounding(export.lowered)
    assert warning.endswith(
        "16 of gguf-q4_1 (they have minimums, and these blocks have none); --own-codes keeps the checkpoint's own "
        "numbers"
    )
    assert encodings_kept(export.lowered) == {}


def test_experts_with_minimums_have_no_remedy(tmp_path):
    export = Export(tmp_path, "moe", "Q4_1", OrtOptions(INT8))
    (warning,) = warn_of_rounding(export.lowered)
    assert warning.endswith("(they have minimums, and these blocks have none)")


OWN = {
    "the README's kind": ("llama-gqa", "Q4_1", {}),
    "llama.cpp's mixture": ("llama-gqa", "Q4_1", {"v_proj__weight": Type.Q8_0, "down_proj__weight": Type.Q5_1}),
    "some plain": ("qwen2", "Q4_0", {"v_proj__weight": Type.F16, "embed_tokens__weight": Type.F16}),
    "a tied table of minimums": ("qwen2-gqa-tied", "Q4_1", {}),
}


@pytest.mark.parametrize(("case", "kind", "kinds"), OWN.values(), ids=OWN)
def test_own_codes_keep_every_type(case, kind, kinds, tmp_path):
    export = Export(tmp_path, case, kind, OrtOptions(own_codes=True, accuracy_level=1), **kinds)
    assert sum(encodings_kept(export.lowered).values()) == len(export.lowered.encodings) > 10
    assert warn_of_rounding(export.lowered) == ()
    model = copy.deepcopy(export.model)
    load(model, export.written)  # what the gguf package dequantizes
    ids = [5, 1, 3, 2, 8, 13]
    want = reference_logits(model, [ids])[0, 3:].numpy()
    stepper = Stepper(export.onnx_file, rows=1, capacity=len(ids))
    got = np.stack([stepper.step([ids[:4]])[0]] + [stepper.step([[token]])[0] for token in ids[4:]])
    assert np.abs(got - want).max() / want.std() < 1e-3


def test_fp32_weights_lose_nothing(tmp_path):
    export = Export(tmp_path, "qwen2", "Q4_1", OrtOptions())
    assert warn_of_rounding(export.lowered) == ()
    assert encodings_kept(export.lowered) == {}


def test_fast_prefill_has_its_own_form_of_the_same_weights(tmp_path):
    export = Export(tmp_path, "qwen2", "Q8_0", OrtOptions(INT8, fast_prefill=True))
    arrays = {each.name: numpy_helper.to_array(each) for each in onnx.load(export.onnx_file).graph.initializer}
    name = "model.layers.0.self_attn.o_proj.weight"
    expected = export.expected(name)
    matrix = blocks_of(arrays[f"{name}_codes"].reshape(64, -1), arrays[f"{name}_scales"], None, 8)
    np.testing.assert_array_equal(matrix, expected)
    channels = arrays[f"{name}_channel_codes"].T * arrays[f"{name}_channel_scales"][:, None]
    step = np.abs(expected).max(axis=1, keepdims=True) / 127
    assert (np.abs(channels - expected) <= 0.501 * step).all()


@pytest.mark.parametrize(("kind", "layout"), [("Q8_0", INT8), ("Q4_0", INT4)])
def test_scales_for_cuda_are_the_files_own_halves(kind, layout, tmp_path):
    options = OrtOptions(layout, provider=Provider.CUDA, accuracy_level=1)
    model = tiny_model(tiny_config())
    written = save_gguf(tmp_path / "m.gguf", model, "qwen2", kind=Type[kind])
    lowered, onnx_file = write(tmp_path / "m.gguf", tmp_path, options, ir.DataType.FLOAT16)
    assert warn_of_rounding(lowered) == ()
    graph = onnx.load(onnx_file).graph
    scales = [each for each in graph.initializer if each.name.endswith("_scales")]
    assert {each.data_type for each in scales} == {onnx.TensorProto.FLOAT16}
    for name, found in decoded(onnx_file).items():
        np.testing.assert_array_equal(found, stacked(written, name), err_msg=name)


def test_a_scale_beyond_fp16_is_refused_for_cuda(tmp_path):
    model = tiny_model(tiny_config(layers=1))
    model.model.layers[0].self_attn.o_proj.weight.data[3, 5] = 1e6
    save_gguf(tmp_path / "m.gguf", model, "qwen2", kind=Type.Q8_0)
    with pytest.raises(ExportError, match=r"a weight of magnitude \S+ doesn't fit float16"):
        write(
            tmp_path / "m.gguf",
            tmp_path,
            OrtOptions(INT8, provider=Provider.CUDA, accuracy_level=1),
            ir.DataType.FLOAT16,
        )


def test_a_graph_lowered_for_other_encodings_is_refused(tmp_path):
    save_gguf(tmp_path / "m.gguf", tiny_model(tiny_config(layers=1)), "qwen2", kind=Type.Q8_0)
    with open_checkpoint(tmp_path / "m.gguf") as source:
        lowered = ort.lower(trace(source.config), OrtOptions(INT8))
        with pytest.raises(ExportError, match=r"expects 0 tensors stored as codes, and 9 are; set Traced\.encodings"):
            stitch(lowered, source, tmp_path / DATA_FILE)
