"""Checkpoints that fix their precision, on ONNX Runtime: every number theirs, read back out of the written graph.

`Written` dequantizes initializers with NumPy, by the documentation of ONNX Runtime's operators, and follows the graph
to find in which order a product gets its input. Logits are compared with transformers in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qwen_aot.errors import CheckpointError, ExportError
from qwen_aot.exporter.checkpoint.storage import storage_of
from qwen_aot.exporter.graph.save import DATA_FILE, save_graph
from qwen_aot.exporter.graph.trace import trace
from qwen_aot.exporter.lowering.encodings import encodings_kept, encodings_requantized, warn_of_rounding
from qwen_aot.exporter.lowering.ort import contrib as ort
from qwen_aot.exporter.lowering.ort.contrib import OrtOptions
from qwen_aot.exporter.lowering.ort.provider import Provider
from qwen_aot.exporter.lowering.own_codes import value_rows
from qwen_aot.exporter.quantize.blockwise import BlockFormat
from qwen_aot.exporter.weights import stitch as stitching
from qwen_aot.exporter.weights.recipe import Traced
from qwen_aot.exporter.weights.stitch import stitch
from tests.checkpoints import reference_logits
from tests.coded_checkpoints import BF16, CODINGS, MOE, CodedCheckpoint, Coding, codings, values_of
from tests.exporter.lowering.ort.test_encodings import blocks_of
from tests.exporter.stepper import Stepper

SINGLE = np.dtype(np.float32)
EXACT = OrtOptions(own_codes=True, accuracy_level=1)  # activations aren't rounded
ON_CUDA = OrtOptions(own_codes=True, accuracy_level=1, provider=Provider.CUDA)
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
RELATIVE_BOUND = 1e-3  # of the logits' deviation; fp32 sums in another order are below 1e-5
traced_once = functools.cache(trace)


def write(
    source: CodedCheckpoint, folder: Path, options: OrtOptions = EXACT, dtype: ir.DataType = ir.DataType.FLOAT
) -> tuple[Traced, Path]:
    folder.mkdir(exist_ok=True)
    once = traced_once(source.config, dtype)
    traced = Traced(once.model.clone(), once.config, dict(once.recipes))
    traced.store_as(storage_of(source))
    lowered = ort.lower(traced, options)
    stitch(lowered, source, folder / DATA_FILE)
    return lowered, save_graph(lowered, folder)


def difference(source: CodedCheckpoint, onnx_file: Path) -> float:
    """The largest difference of a logit from transformers', in deviations of the logits."""
    want = reference_logits(source.model, [IDS])[0, 5:].numpy()
    stepper = Stepper(onnx_file, rows=1, capacity=len(IDS) + 8)
    got = np.stack([stepper.step([IDS[:6]])[0]] + [stepper.step([[token]])[0] for token in IDS[6:]])
    return float(np.abs(got - want).max() / want.std())


class Written:
    """The products of a written graph, as the matrices that they multiply by, and the embedding."""

    def __init__(self, onnx_file: Path) -> None:
        graph = onnx.load(onnx_file).graph
        self.arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.nodes = list(graph.node)
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.producers = {name: node for node in self.nodes for name in node.output}

    def matrices(self) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        """By the name of each product's weight: its values [N, K] (experts [E, N, K]) and the order of its input."""
        found, tables = {}, {}
        for node in self.nodes:
            attributes = {each.name: each.i for each in node.attribute}
            if node.op_type == "MatMulNBits":
                _, codes, scales, *rest = node.input
                zeros = self.arrays.get(rest[0]) if rest else None
                values = blocks_of(
                    self.arrays[codes].reshape(len(self.arrays[codes]), -1),
                    self.arrays[scales],
                    zeros,
                    attributes["bits"],
                )
                name = codes.removesuffix("_codes")
                if (offsets := self.arrays.get(f"{name}_offsets")) is not None:
                    values = self.with_offsets(name, values, offsets, attributes["block_size"])
                found[name] = values[:, : attributes["K"]], self.order_of(node.input[0])
            elif node.op_type == "GatherBlockQuantized":
                codes, _, scales, *rest = node.input
                name = codes.removesuffix("_codes")
                zeros = self.arrays[rest[0]][..., 0] if rest and rest[0] else None
                assert zeros is None  # of the models here
                stored = self.arrays[self.producers[scales].input[0]]
                values = blocks_of(self.arrays[codes].reshape(len(stored), -1), stored, zeros, attributes["bits"])
                if (offsets := self.arrays.get(f"{name}_row_offsets")) is not None:
                    spread = np.repeat(offsets.astype(np.float64), attributes["block_size"], axis=1)
                    values = (values + spread).astype(np.float32)
                tables[name] = values, None
            elif node.op_type == "QMoE":
                for codes, scales, zero in ((2, 3, 11), (5, 6, 12)):
                    name = node.input[codes]
                    zeros = self.arrays.get(node.input[zero])
                    values = blocks_of(
                        self.arrays[name], self.arrays[node.input[scales]], zeros, attributes["expert_weight_bits"]
                    )
                    found[name.removesuffix("_codes")] = values, self.order_of(node.input[0]) if codes == 2 else None
        for name, (values, _) in tables.items():  # of a tied model both must be the same
            np.testing.assert_array_equal(values, found.setdefault(name, (values, None))[0])
        return found

    def with_offsets(self, name: str, values: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
        """The values, whose product and that of the offsets [n, N] with the input's block sums are added."""
        users = [node for node in self.nodes if f"{name}_offsets" in node.input]
        assert {node.op_type for node in users} == {"MatMul"}
        for node in users:
            assert self.producers[node.input[0]].op_type == "ReduceSum"
        return (values + np.repeat(offsets.T.astype(np.float64), size, axis=1)).astype(np.float32)

    def order_of(self, value: str) -> np.ndarray | None:
        """The elements that the Gather in front of a product picks."""
        node = self.producers[value]
        indices = self.arrays.get(node.input[1]) if node.op_type == "Gather" else None
        return indices if indices is not None and indices.ndim == 1 and len(indices) > 1 else None


def rows_in_graph(source: CodedCheckpoint, name: str) -> np.ndarray:
    """The rows of a tensor in the order in which the next product wants them, where that was folded into it."""
    values = source.values[name]
    down = source.coded.get(name.replace("gate_proj", "down_proj").replace("up_proj", "down_proj"))
    if ("gate_proj" in name or "up_proj" in name) and down is not None and down.permutation is not None:
        return values[down.permutation]
    output = source.coded.get(name.replace("v_proj", "o_proj"))
    if "v_proj" in name and output is not None and output.permutation is not None:
        head_dim, groups = source.config.head_dim, source.config.num_key_value_heads
        within = output.permutation.reshape(groups, -1, head_dim) % head_dim
        heads = output.permutation.reshape(-1, head_dim) // head_dim
        if (heads == heads[:, :1]).all() and (heads[:, 0] == np.arange(len(heads))).all():
            order = within[:, 0] + np.arange(groups)[:, None] * head_dim
            return values[order.reshape(-1)]
    return values


def parts_of(source: CodedCheckpoint, name: str) -> list[str]:
    """The tensors of an initializer."""
    for joined, parts in (("qkv_proj", "q k v"), ("gate_up_proj", "gate up")):
        if joined in name:
            return [name.replace(joined, f"{part}_proj") for part in parts.split()]
    if name.endswith(("experts_gate_up", "experts_down")):
        prefix, _, kind = name.rpartition("experts_")
        kinds = ("gate", "up") if kind == "gate_up" else ("down",)
        assert source.config.moe is not None
        return [
            f"{prefix}experts.{e}.{part}_proj.weight" for e in range(source.config.moe.num_experts) for part in kinds
        ]
    return [name]


def expected(source: CodedCheckpoint, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What a product's matrix must be, and its input's order where it must be gathered."""
    parts = parts_of(source, name)
    order = source.coded[parts[0]].permutation
    rows = [rows_in_graph(source, part) for part in parts]
    if name.endswith("experts_gate_up"):
        rows = [
            np.stack(pair, axis=1).reshape(-1, pair[0].shape[1]) for pair in zip(rows[::2], rows[1::2], strict=True)
        ]
    columns = [
        values if (own := source.coded[part].permutation) is None else values[:, own]
        for part, values in zip(
            parts if "gate_up" not in name or "experts" not in name else parts[::2], rows, strict=True
        )
    ]
    stacked = np.stack(columns) if "experts_" in name else np.concatenate(columns)
    is_folded = "down_proj" in name or name.endswith("experts_down")
    if "o_proj" in name and order is not None:
        head_dim = source.config.head_dim
        is_folded = bool((order // head_dim == np.arange(len(order)) // head_dim).all())
    return stacked, None if is_folded else order


def assert_bit_equal(source: CodedCheckpoint, onnx_file: Path) -> None:
    found = Written(onnx_file).matrices()
    assert {part for name in found for part in parts_of(source, name)} == source.coded.keys()
    for name, (values, order) in found.items():
        want, wanted_order = expected(source, name)
        where = tuple(slice(0, size) for size in want.shape)
        np.testing.assert_array_equal(values[where], want, err_msg=name)
        assert not np.delete(values, np.s_[: want.shape[-2]], axis=-2).any()
        assert not np.delete(values, np.s_[: want.shape[-1]], axis=-1).any()
        assert (order is None) == (wanted_order is None), name
        if order is not None:
            np.testing.assert_array_equal(order, wanted_order, err_msg=name)


@pytest.mark.parametrize("name", codings())
def test_a_dense_model_is_the_checkpoints_bit_for_bit(name, tmp_path):
    source = CodedCheckpoint(CODINGS[name])
    lowered, onnx_file = write(source, tmp_path)
    assert_bit_equal(source, onnx_file)
    assert difference(source, onnx_file) < RELATIVE_BOUND
    assert sum(encodings_kept(lowered).values()) == len(source.coded)
    assert encodings_requantized(lowered) == {} and warn_of_rounding(lowered) == ()


ONE = {"num_experts": 1, "num_experts_per_tok": 1}
EXPERTS = ("4 bits", "4 bits, zero points", "one order an input", "orders within heads", "3 bits")


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        pytest.param(name, experts, marks=() if is_first else pytest.mark.deep)
        for name in EXPERTS
        for experts in ({}, ONE)
        if (is_first := (name in EXPERTS[1:3] and not experts) or (name == "4 bits" and experts)) is not None
    ],
)
def test_experts_are_the_checkpoints_bit_for_bit(name, experts, tmp_path):
    source = CodedCheckpoint(CODINGS[name], moe=MOE | experts)
    lowered, onnx_file = write(source, tmp_path)
    assert_bit_equal(source, onnx_file)
    assert sum(encodings_kept(lowered).values()) == len(source.coded)
    if "heads" not in name:  # eight-bit experts have no fp32 kernel
        assert difference(source, onnx_file) < RELATIVE_BOUND


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_one_changed_offset_is_seen(tied, tmp_path):
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        source = CodedCheckpoint(CODINGS["minimums and not"], tied=tied)
        _, onnx_file = write(source, tmp_path)
        source.change("one offset", name)
        with pytest.raises(AssertionError):
            assert_bit_equal(source, onnx_file)


def test_a_tied_table_with_minimums_is_gathered_and_multiplied_by(tmp_path):
    source = CodedCheckpoint(CODINGS["minimums and not"], tied=True)
    lowered, onnx_file = write(source, tmp_path)
    assert_bit_equal(source, onnx_file)
    assert difference(source, onnx_file) < RELATIVE_BOUND
    assert sum(encodings_kept(lowered).values()) == len(source.coded)


@pytest.mark.parametrize("kind", ["zero point", "two columns", "one code", "one scale", "one order"])
def test_one_changed_number_is_seen(kind, tmp_path):
    source = CodedCheckpoint(CODINGS["an order of its own each"])
    _, onnx_file = write(source, tmp_path)
    source.change(kind)
    with pytest.raises(AssertionError):
        assert_bit_equal(source, onnx_file)
    if kind in ("two columns", "one order"):
        assert difference(source, onnx_file) > RELATIVE_BOUND


def test_rows_that_are_read_in_pieces_are_the_same(tmp_path, monkeypatch):
    for name in ("mixed", "orders within heads"):
        source = CodedCheckpoint(CODINGS[name])
        write(source, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(stitching, "CHUNK_BYTES", 3000)
            write(source, tmp_path / "pieces")
        assert (tmp_path / "whole" / DATA_FILE).read_bytes() == (tmp_path / "pieces" / DATA_FILE).read_bytes()


def test_each_matrix_has_its_own_blocks(tmp_path):
    lowered, _ = write(CodedCheckpoint(CODINGS["mixed"]), tmp_path)
    found = {
        node.inputs[1].name.removesuffix("_codes"): tuple(
            node.attributes[name].as_int() for name in ("bits", "block_size")
        )
        for node in lowered.model.graph
        if node.op_type == "MatMulNBits"
    }
    first = "model.layers.0."
    assert found[f"{first}self_attn.q_proj.weight"] == (4, 64)
    assert found[f"{first}self_attn.v_proj.weight"] == (8, 32)
    assert found[f"{first}mlp.up_proj.weight"] == found["model.layers.1.mlp.gate_up_proj.weight"] == (4, 64)
    assert found["model.layers.1.mlp.down_proj.weight"] == (8, 32)
    assert f"{first}self_attn.k_proj.weight" not in found and f"{first}mlp.gate_proj.weight" not in found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32])
def test_embedding_and_head_stay_the_checkpoints_numbers(tied, dtype, tmp_path):
    source = CodedCheckpoint(Coding(), plain_dtype=dtype, tied=tied)
    lowered, onnx_file = write(source, tmp_path)
    tables = {name: value for name, value in lowered.model.graph.initializers.items() if value.shape[0] == 131}
    assert tables.keys() == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name, table in tables.items():
        assert table.dtype.numpy() == dtype
        np.testing.assert_array_equal(table.const_value.numpy(), source.plain[name])
    assert difference(source, onnx_file) < RELATIVE_BOUND


def test_embedding_and_head_are_quantized_on_request(tmp_path):
    options = dataclasses.replace(EXACT, sensitive=BlockFormat(8, 32))
    source = CodedCheckpoint(Coding(4, 64), tied=True)
    lowered, onnx_file = write(source, tmp_path, options)
    assert "model.embed_tokens.weight_codes" in lowered.model.graph.initializers
    assert RELATIVE_BOUND < difference(source, onnx_file) < 0.15
    assert_kept = Written(onnx_file).matrices()["model.layers.0.mlp.down_proj.weight"][0]
    np.testing.assert_array_equal(assert_kept[:, :160], source.values["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize("name", ["8 bits, zero points", "bf16 scales", "one order an input", "mixed"])
def test_for_cuda_scales_are_the_checkpoints_halves(name, tmp_path):
    source = CodedCheckpoint(CODINGS[name])
    lowered, onnx_file = write(source, tmp_path, ON_CUDA, ir.DataType.FLOAT16)
    assert_bit_equal(source, onnx_file)
    scales = [value for name, value in lowered.model.graph.initializers.items() if name.endswith("_scales")]
    assert {value.dtype for value in scales} == {ir.DataType.FLOAT16}


def test_fast_prefill_has_its_own_form_of_the_same_weights(tmp_path):
    source = CodedCheckpoint(CODINGS["one order an input"])
    _, onnx_file = write(source, tmp_path, dataclasses.replace(EXACT, fast_prefill=True))
    assert difference(source, onnx_file) < RELATIVE_BOUND  # six tokens: not enough for the other form
    arrays = Written(onnx_file).arrays
    name = "model.layers.0.mlp.down_proj.weight"
    want, _ = expected(source, name)
    found = arrays[f"{name}_channel_codes"].T * arrays[f"{name}_channel_scales"][:, None]
    step = np.abs(want).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - want) <= 0.501 * step).all()


def test_fast_prefill_adds_offsets_once(tmp_path):
    """The 8-bit form is without them, and both branches add them."""
    source = CodedCheckpoint(CODINGS["minimums"])
    _, onnx_file = write(source, tmp_path, dataclasses.replace(EXACT, fast_prefill=True))
    name = "model.layers.0.mlp.down_proj.weight"
    rows, arrays = source.coded[name], Written(onnx_file).arrays
    want = values_of(dataclasses.replace(rows, offsets=None))
    found = arrays[f"{name}_channel_codes"].T * arrays[f"{name}_channel_scales"][:, None]
    step = np.abs(want).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - want) <= 0.501 * step).all()
    assert (np.abs(found - source.values[name]) > step).any()
    (branches,) = (node for node in onnx.load(onnx_file).graph.node if node.op_type == "If")
    for branch in branches.attribute:
        users = [node for node in branch.g.node if f"{name}_offsets" in node.input]
        assert len(users) == 1
        adds = [node for node in branch.g.node if users[0].output[0] in node.input]
        assert [add.op_type for add in adds] == ["Add"]


def test_for_cuda_offsets_are_added_in_fp32(tmp_path):
    source = CodedCheckpoint(CODINGS["minimums"])
    lowered, onnx_file = write(source, tmp_path, ON_CUDA, ir.DataType.FLOAT16)
    assert_bit_equal(source, onnx_file)
    offsets = [value for name, value in lowered.model.graph.initializers.items() if name.endswith("_offsets")]
    assert {value.dtype for value in offsets} == {ir.DataType.FLOAT}
    adds = [node for node in lowered.model.graph if node.op_type == "Add" and str(node.name).endswith("_sum")]
    assert len(adds) == len(offsets) and {value.dtype for add in adds for value in add.outputs} <= {None}
    assert {add.outputs[0].consumers()[0].op_type for add in adds} == {"Cast"}


REFUSED: dict[str, tuple[dict[str, Any], OrtOptions, ir.DataType, str]] = {
    "groups of 24": ({"coding": Coding(4, 24)}, EXACT, ir.DataType.FLOAT, r"4 bits in groups of 24.*none of which"),
    "fp32 scales": (
        {"coding": Coding(scale_dtype=SINGLE)},
        ON_CUDA,
        ir.DataType.FLOAT16,
        "float32 scales, which float16",
    ),
    "experts in different orders": (
        {"coding": Coding(4, 32, permuted="by tensor"), "moe": MOE},
        EXACT,
        ir.DataType.FLOAT,
        "columns in different orders .g_idx of act-order.*--precision fp32",
    ),
    "some experts are numbers": (
        {"coding": lambda name: Coding() if "experts." in name and "experts.1." not in name else None, "moe": MOE},
        EXACT,
        ir.DataType.FLOAT,
        "experts.1.gate_proj.weight is plain numbers",
    ),
    "groups that the hidden size isn't whole of": (
        {"coding": Coding(4, 64), "moe": MOE, "hidden": 96, "head_dim": 24},
        EXACT,
        ir.DataType.FLOAT,
        "",
    ),
    "experts with minimums": (
        {"coding": Coding(4, 32, offsets=True), "moe": MOE},
        EXACT,
        ir.DataType.FLOAT,
        "4 bits in groups of 32 with minimums, and ONNX Runtime's QMoE has no minimums; accepted: types without them",
    ),
    "rows that blocks with minimums aren't whole of": (
        {"coding": Coding(4, 128, offsets=True), "intermediate": 200},
        EXACT,
        ir.DataType.FLOAT,
        "down_proj.weight is stored as 4 bits in groups of 128 with minimums",
    ),
    "quantized experts on CUDA": (
        {"coding": Coding(), "moe": MOE},
        ON_CUDA,
        ir.DataType.FLOAT16,
        "experts don't exist",
    ),
}


@pytest.mark.parametrize(("model", "options", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_kernel_holds_is_refused_by_name(model, options, dtype, message, tmp_path):
    if not message:  # blocks of 32 hold groups of 64 and divide 96
        source = CodedCheckpoint(**model)
        assert_bit_equal(source, write(source, tmp_path, options, dtype)[1])
        return
    with pytest.raises(ExportError, match=message):
        write(CodedCheckpoint(**model), tmp_path, options, dtype)


def test_an_order_that_changed_since_it_was_read_is_seen(tmp_path):
    source = CodedCheckpoint(CODINGS["one order an input"])
    traced = trace(source.config)
    traced.store_as(storage_of(source))
    lowered = ort.lower(traced, EXACT)
    name = "model.layers.0.mlp.down_proj.weight"
    rows = source.coded[name]
    source.coded[name] = dataclasses.replace(rows, permutation=rows.permutation[::-1])
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: the codes' order of columns isn't the one"):
        stitch(lowered, source, tmp_path / DATA_FILE)


@pytest.mark.parametrize(
    ("order", "rows"),
    [
        ([1, 0, 3, 2, 5, 4, 7, 6], [1, 0, 3, 2]),  # the same in both query heads of each key-value head
        ([1, 0, 3, 2, 4, 5, 6, 7], [1, 0, 2, 3]),  # each key-value head its own
        ([1, 0, 2, 3, 5, 4, 7, 6], None),  # two query heads of one differ
        ([2, 3, 0, 1, 4, 5, 6, 7], None),  # heads change places
        ([0, 4, 2, 3, 1, 5, 6, 7], None),
    ],
)
def test_only_an_order_within_heads_goes_into_the_values(order, rows):
    found = value_rows(np.array(order), 4, 2, 2)
    assert found is None if rows is None else found is not None and found.tolist() == rows


def test_orders_are_gathered_once_for_all_that_read_one_input_and_folded_where_they_can_be(tmp_path):
    def gathers(name: str) -> int:
        lowered, _ = write(CodedCheckpoint(CODINGS[name]), tmp_path / name)
        return sum("_ordered" in str(node.name) for node in lowered.model.graph)

    assert gathers("one order an input") == 2 * 3  # in front of q|k|v, o, gate|up; down's is in gate's and up's rows
    assert gathers("orders within heads") == 2 * 2  # and o's in v's
    assert gathers("an order of its own each") == 2 * 6
    assert gathers("mixed") == 0
