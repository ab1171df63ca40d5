"""Recipes and stitching: what is refused, and that bytes don't depend on how rows are cut."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qwen_aot.errors import CheckpointError, ExportError
from qwen_aot.exporter.checkpoint import mapped
from qwen_aot.exporter.checkpoint.base import TensorInfo, encodings_of
from qwen_aot.exporter.checkpoint.encoding import CodeForm, EncodedRows, Encoding
from qwen_aot.exporter.checkpoint.hf.safetensors import SafetensorsShards
from qwen_aot.exporter.lowering.passes import transpose_recipe
from qwen_aot.exporter.model.config import ModelConfig, MoeConfig
from qwen_aot.exporter.weights import stitch as weights
from qwen_aot.exporter.weights.recipe import Output, Recipe, Source, Traced, cast_to, output_bytes_of
from qwen_aot.exporter.weights.stitch import output_bytes, stitch


class ArrayCheckpoint:
    """A checkpoint of arrays in memory."""

    path = Path("arrays")

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = {name.replace("__", "."): array for name, array in arrays.items()}

    @property
    def tensors(self) -> Any:
        return MappingProxyType(
            {name: TensorInfo(name, array.shape, array.dtype) for name, array in self.arrays.items()}
        )

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.arrays[name] if rows is None else self.arrays[name][rows]


def config(*, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        model_type="qwen2",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=tied,
    )


def traced(*recipes: Recipe, tied: bool = False) -> Traced:
    """A graph whose initializers are exactly the recipes' outputs."""
    outputs = [output for recipe in recipes for output in recipe.outputs]
    values = [
        ir.Value(
            name=o.name,
            type=ir.TensorType(o.dtype),
            shape=ir.Shape(o.shape),
            const_value=ir.ExternalTensor("none", 0, o.nbytes, o.dtype, shape=ir.Shape(o.shape), name=o.name),
        )
        for o in outputs
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 24})
    return Traced(
        ir.Model(graph, ir_version=10), config(tied=tied), {recipe.outputs[0].name: recipe for recipe in recipes}
    )


def plain(name: str, *shapes: tuple[int, ...], dtype: ir.DataType = ir.DataType.FLOAT) -> Recipe:
    sources = tuple(Source(f"{name}{i}", shape) for i, shape in enumerate(shapes))
    rows = sum(shape[0] for shape in shapes)
    return Recipe(sources, (Output(name, dtype, (rows, *shapes[0][1:])),), cast_to(dtype))


def read_back(graph: Traced, name: str) -> np.ndarray:
    tensor = graph.model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_sources_are_stacked_cast_and_placed(tmp_path):
    rng = np.random.default_rng(0)
    a, b, n = rng.normal(size=(3, 5)), rng.normal(size=(2, 5)), rng.normal(size=(7,))
    graph = traced(plain("w", (3, 5), (2, 5), dtype=ir.DataType.FLOAT16), plain("n", (7,)))
    stitch(graph, ArrayCheckpoint(w0=a.astype(np.float32), w1=b.astype(np.float32), n0=n), tmp_path / "data")
    np.testing.assert_array_equal(read_back(graph, "w"), np.concatenate([a, b]).astype(np.float32).astype(np.float16))
    np.testing.assert_array_equal(read_back(graph, "n"), n.astype(np.float32))
    assert (tmp_path / "data").stat().st_size == output_bytes(graph)
    assert output_bytes_of(graph, ir.DataType.FLOAT16) == 5 * 5 * 2


@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    columns=st.integers(1, 9),
    chunk_rows=st.integers(1, 50),
    group=st.sampled_from([1, 2, 5]),
    is_transposed=st.booleans(),
    threads=st.integers(1, 3),
)
def test_bytes_do_not_depend_on_how_rows_are_cut(
    rows, columns, chunk_rows, group, is_transposed, threads, tmp_path_factory
):
    rows = [count * group for count in rows]
    total = sum(rows)
    arrays = {
        f"w{i}": np.random.default_rng(i).normal(size=(count, columns)).astype(np.float32)
        for i, count in enumerate(rows)
    }
    sources = tuple(Source(name, array.shape) for name, array in arrays.items())
    stacked = np.concatenate(list(arrays.values()))

    def transform(chunk: np.ndarray) -> tuple[np.ndarray, ...]:
        assert len(chunk) % group == 0
        values = chunk.T if is_transposed else chunk
        return values, chunk.reshape(-1, group * columns).sum(1)

    shape, axis = ((columns, total), 1) if is_transposed else ((total, columns), 0)
    outputs = (Output("w", ir.DataType.FLOAT, shape, axis), Output("sums", ir.DataType.FLOAT, (total // group,)))
    graph = traced(Recipe(sources, outputs, transform, rows_per_group=group))
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK_BYTES", 4 * columns * chunk_rows)
        stitch(graph, ArrayCheckpoint(**arrays), folder / "data", threads=threads)
    np.testing.assert_array_equal(read_back(graph, "w"), stacked.T if is_transposed else stacked)
    np.testing.assert_array_equal(read_back(graph, "sums"), stacked.reshape(-1, group * columns).sum(1))


HALF = np.dtype(np.float16)


class CodedCheckpoint(ArrayCheckpoint):
    """Matrices stored as bytes in blocks of 4, by name; `read` isn't expected."""

    def __init__(self, **rows: EncodedRows) -> None:
        super().__init__(**{name: each.codes for name, each in rows.items()})
        self.rows = rows

    @property
    def tensors(self) -> Any:
        encoding = Encoding("bytes", CodeForm(8, 4, HALF))
        return {name: dataclasses.replace(info, encoding=encoding) for name, info in super().tensors.items()}

    def read_encoded(self, name: str, rows: slice) -> EncodedRows:
        whole = self.rows[name]
        return dataclasses.replace(whole, codes=whole.codes[rows], scales=whole.scales[rows])


def coded(rows: int, seed: int, *, bad_scale: float | None = None) -> EncodedRows:
    rng = np.random.default_rng(seed)
    scales = rng.normal(size=(rows, 2)).astype(np.float16)
    if bad_scale is not None:
        scales[1, 1] = bad_scale
    return EncodedRows(CodeForm(8, 4, HALF), rng.integers(0, 256, (rows, 8), np.uint8), scales)


def of_codes(checkpoint: CodedCheckpoint) -> Traced:
    """A graph of all codes and all scales, stacked."""

    def refuse(rows: np.ndarray) -> tuple[np.ndarray, ...]:
        raise AssertionError("made from floats")

    def from_codes(parts: Sequence[EncodedRows]) -> tuple[np.ndarray, ...]:
        return np.concatenate([part.codes for part in parts]), np.concatenate([part.scales for part in parts])

    total = sum(len(rows.codes) for rows in checkpoint.rows.values())
    outputs = (Output("codes", ir.DataType.UINT8, (total, 8)), Output("scales", ir.DataType.FLOAT16, (total, 2)))
    sources = tuple(Source(name, rows.codes.shape) for name, rows in checkpoint.rows.items())
    graph = traced(Recipe(sources, outputs, refuse, from_codes=from_codes))
    graph.encodings = encodings_of(checkpoint)
    return graph


@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=4), chunk_rows=st.integers(1, 30))
def test_codes_do_not_depend_on_how_rows_are_cut(counts, chunk_rows, tmp_path_factory):
    checkpoint = CodedCheckpoint(**{f"w{i}": coded(count, i) for i, count in enumerate(counts)})
    graph = of_codes(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK_BYTES", 4 * 8 * chunk_rows)
        stitch(graph, checkpoint, tmp_path_factory.mktemp("codes") / "data")
    for name in ("codes", "scales"):
        expected = np.concatenate([getattr(rows, name) for rows in checkpoint.rows.values()])
        np.testing.assert_array_equal(read_back(graph, name), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_named(value, tmp_path):
    checkpoint = CodedCheckpoint(w0=coded(3, 0), w1=coded(3, 1, bad_scale=value))
    with pytest.raises(CheckpointError, match=rf"tensor w1 \(scales\) holds {value} at \[1, 1\]"):
        stitch(of_codes(checkpoint), checkpoint, tmp_path / "data")


def test_what_changes_a_recipe_changes_what_it_makes_of_codes(tmp_path):
    checkpoint = CodedCheckpoint(w0=coded(3, 0))
    graph = of_codes(checkpoint)
    (recipe,) = graph.recipes.values()
    widened = (recipe.outputs[0], dataclasses.replace(recipe.outputs[1], dtype=ir.DataType.FLOAT))
    wide = recipe.converted(widened, lambda arrays: (arrays[0], arrays[1].astype(np.float32)))
    graph = traced(wide)
    graph.encodings = encodings_of(checkpoint)
    stitch(graph, checkpoint, tmp_path / "data")
    np.testing.assert_array_equal(read_back(graph, "scales"), checkpoint.rows["w0"].scales.astype(np.float32))


@pytest.mark.parametrize("chunk_bytes", [1, 36, 16 << 20])
def test_a_computed_initializer_is_made_of_its_rows_indices(chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
    table = Output("t", ir.DataType.FLOAT, (7, 3))
    graph = traced(Recipe((), (table,), lambda rows: (rows[:, None] * np.arange(3, dtype=np.float32),)))
    stitch(graph, ArrayCheckpoint(), tmp_path / "data")
    np.testing.assert_array_equal(read_back(graph, "t"), np.outer(np.arange(7), np.arange(3)))


def test_progress_ends_at_the_total(tmp_path):
    seen: list[tuple[int, int]] = []
    graph = traced(plain("w", (100, 8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK_BYTES", 320)
        stitch(
            graph,
            ArrayCheckpoint(w0=np.ones((100, 8), np.float32)),
            tmp_path / "data",
            on_progress=lambda *progress: seen.append(progress),
        )
    assert len(seen) == 10
    assert seen[-1] == (3200, 3200)
    assert seen == sorted(seen)


ONES = np.ones((3, 5), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"tensor w0 is missing \(shape \[3, 5\] expected"),
        ({"y__w0": ONES}, r"tensor w0 is missing .* has 1 tensors; nearest by name: y\.w0$"),
        ({"w0": ONES, "y__w0": ONES}, r"no place for 1 tensors: y\.w0; nearest by name: w0; does config\.json"),
        ({"w0": ONES.T}, r"tensor w0 has shape \[5, 3\].*asks for \[3, 5\]"),
        ({"w0": ONES, "extra__weight": ONES}, r"no place for 1 tensors: extra\.weight"),
        ({"w0": np.where(np.arange(15).reshape(3, 5) == 7, np.nan, ONES)}, r"tensor w0 holds nan at \[1, 2\]"),
        ({"w0": np.where(np.arange(15).reshape(3, 5) == 14, -np.inf, ONES)}, r"tensor w0 holds -inf at \[2, 4\]"),
    ],
)
def test_a_wrong_tensor_is_named(arrays, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        stitch(traced(plain("w", (3, 5))), ArrayCheckpoint(**arrays), tmp_path / "data")


def test_a_large_finite_tensor_whose_sum_overflows_is_accepted(tmp_path):
    graph = traced(plain("w", (3, 5)))
    stitch(graph, ArrayCheckpoint(w0=np.full((3, 5), 3e38, np.float32)), tmp_path / "data")
    assert read_back(graph, "w").max() == np.float32(3e38)


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (ir.DataType.FLOAT16, -70000, r"row 2: a weight of magnitude 70000 doesn't fit float16 \(at most 65504\)"),
        (ir.DataType.BFLOAT16, 3.4e38, r"row 2: .* 3\.4e\+38 doesn't fit bfloat16 \(at most 3\.38953e\+38\)"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_weight_that_would_become_infinite_is_refused(dtype, value, message, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_BYTES", 40)  # two rows: the row is counted from the tensor's first
    graph = traced(plain("w", (3, 5), (4, 5), dtype=dtype))
    arrays = [np.zeros((3, 5), np.float32), np.zeros((4, 5), np.float32)]
    arrays[1][2, 3] = value
    with pytest.raises(ExportError, match=f"arrays: tensor w1, {message}"):
        stitch(graph, ArrayCheckpoint(w0=arrays[0], w1=arrays[1]), tmp_path / "data")


def test_rows_of_a_computed_initializer_are_counted_beyond_what_float32_counts(tmp_path):
    """Behind 2**24, where float32 has every second number only, as a position that is converted alone."""
    rows = 2**24 + 2 * weights.CHUNK_BYTES // 4
    output = Output("w", ir.DataType.UINT8, (rows, 1))
    recipe = Recipe((), (output,), lambda indices: ((indices % 251).astype(np.uint8)[:, None],))
    graph = traced(recipe)
    stitch(graph, ArrayCheckpoint(), tmp_path / "data")
    expected = np.arange(rows, dtype=np.int64).astype(np.float32) % 251
    np.testing.assert_array_equal(read_back(graph, "w")[:, 0], expected.astype(np.uint8))


def test_a_float64_value_beyond_float32_is_named(tmp_path):
    graph = traced(plain("w", (3, 5)))
    array = np.full((3, 5), 1e30)
    stitch(graph, ArrayCheckpoint(w0=array), tmp_path / "data")
    np.testing.assert_array_equal(read_back(graph, "w"), array.astype(np.float32))
    array[1, 4] = -1e39
    with pytest.raises(CheckpointError, match=r"w0 holds -1e\+39 at \[1, 4\], which float32 doesn't hold"):
        stitch(graph, ArrayCheckpoint(w0=array), tmp_path / "data")


def embedding() -> Recipe:
    name = "model.embed_tokens.weight"
    return Recipe((Source(name, (8, 8)),), (Output(name, ir.DataType.FLOAT, (8, 8)),), cast_to(ir.DataType.FLOAT))


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_tied_head_in_the_checkpoint_must_equal_the_embedding(is_equal, tmp_path):
    table = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    head = table if is_equal else table + np.float32(1e-3)
    checkpoint = ArrayCheckpoint(model__embed_tokens__weight=table, lm_head__weight=head)
    graph = traced(embedding(), tied=True)
    if is_equal:
        stitch(graph, checkpoint, tmp_path / "data")
    else:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            stitch(graph, checkpoint, tmp_path / "data")


def test_old_rotary_buffers_are_skipped(tmp_path):
    checkpoint = ArrayCheckpoint(w0=ONES, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32))
    stitch(traced(plain("w", (3, 5))), checkpoint, tmp_path / "data")


def test_what_an_empty_shared_expert_leaves_in_a_checkpoint_is_skipped(tmp_path):
    moe = MoeConfig(4, 2, 8, 0, norm_topk_prob=False, sparse_layers=frozenset({0}))
    graph = traced(plain("w", (3, 5)))
    graph.config = dataclasses.replace(graph.config, model_type="qwen2_moe", moe=moe)
    mlp = "model__layers__0__mlp__"
    left = {f"{mlp}shared_expert_gate__weight": ONES[:1], f"{mlp}shared_expert__up_proj__weight": ONES[:0]}
    stitch(graph, ArrayCheckpoint(w0=ONES, **left), tmp_path / "data")
    graph.config = dataclasses.replace(graph.config, moe=dataclasses.replace(moe, shared_expert_intermediate_size=8))
    with pytest.raises(CheckpointError, match=r"no place for 2 tensors: model\.layers\.0\.mlp\.shared_expert\.up"):
        stitch(graph, ArrayCheckpoint(w0=ONES, **left), tmp_path / "data")


def test_a_full_disk_is_an_error_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        stitch(traced(plain("w", (3, 5))), ArrayCheckpoint(w0=ONES), tmp_path / "data")


@pytest.mark.parametrize("made", [np.zeros((3, 4)), np.zeros((3, 6)), np.zeros((1, 5))], ids=lambda a: str(a.shape))
def test_a_recipe_that_makes_another_size_than_it_says_is_refused(made, tmp_path):
    recipe = Recipe(
        (Source("w0", (3, 5)),), (Output("w", ir.DataType.FLOAT, (3, 5)),), lambda _: (made.astype(np.float32),)
    )
    with pytest.raises(ExportError, match=rf"recipe of w made {made.size * 4} bytes of rows 0 to 3, .* holds 60"):
        stitch(traced(recipe), ArrayCheckpoint(w0=ONES), tmp_path / "data")


class WideCheckpoint:
    """One tensor of any size, the same values in each row, made when it is read."""

    path = Path("wide")

    def __init__(self, shape: tuple[int, int]) -> None:
        self.tensors = {"w0": TensorInfo("w0", shape, np.dtype(np.float32))}
        self._row = np.arange(shape[1], dtype=np.float32)

    def read(self, name: str, rows: slice) -> np.ndarray:
        return np.repeat(self._row[None], rows.stop - rows.start, axis=0)


def peak_resident_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and pages are dropped on Linux only")
@pytest.mark.parametrize("is_transposed", [False, True])
def test_memory_does_not_grow_with_the_tensor(is_transposed, tmp_path):
    shape = (1536, 65536)  # 400 MB; transposed, a chunk of rows is a thin stripe over the whole output
    recipe = plain("w", shape)
    graph = traced(transpose_recipe(recipe) if is_transposed else recipe)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_resident_bytes()
    stitch(graph, WideCheckpoint(shape), tmp_path / "data", threads=2)
    assert peak_resident_bytes() - before < 200 << 20  # two threads, three 16 MiB copies and 32 MiB written each
    written = np.memmap(tmp_path / "data", np.float32, "r", shape=shape[::-1] if is_transposed else shape)
    sample = written[::4096, ::7].T if is_transposed else written[::7, ::4096]
    np.testing.assert_array_equal(sample, np.broadcast_to(np.arange(0, 65536, 4096), sample.shape))


def test_a_failing_chunk_ends_the_work_and_is_raised(tmp_path):
    """Neither the queue nor the other threads keep `stitch` from returning."""
    calls = []

    def transform(rows: np.ndarray) -> tuple[np.ndarray, ...]:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt  # as from Ctrl-C, whichever thread it is raised in
        return (rows,)

    recipe = Recipe((Source("w0", (1000, 8)),), (Output("w", ir.DataType.FLOAT, (1000, 8)),), transform)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weights, "CHUNK_BYTES", 32)
        stitch(traced(recipe), ArrayCheckpoint(w0=np.ones((1000, 8), np.float32)), tmp_path / "data", threads=2)
    assert len(calls) < 20  # of 1000


def test_threads_may_drop_pages_that_others_read(tmp_path):
    """A mapped page that is dropped under a reader comes back from the file."""
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.normal(size=(64, 4096)).astype(np.float32) for i in range(6)}
    save_file(arrays, tmp_path / "model.safetensors")
    graph = traced(plain("w", *(array.shape for array in arrays.values())))
    with pytest.MonkeyPatch.context() as patch, closing(SafetensorsShards(tmp_path)) as shards:
        patch.setattr(mapped, "_RESIDENT_BYTES", 0)  # every read drops all pages
        patch.setattr(weights, "CHUNK_BYTES", 1 << 16)
        shards.path = tmp_path
        stitch(graph, shards, tmp_path / "data", threads=8)
    np.testing.assert_array_equal(read_back(graph, "w"), np.concatenate(list(arrays.values())))
